"""A checksum of files of the user, by which a resumed run knows that they have not changed."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["checksum_of"]

_BLOCK = 1 << 16
_MOST_BLOCKS = 1024


def checksum_of(files: Mapping[str, Path]) -> str | None:
    """Hash names, sizes and contents; of more than 64 MiB, 1024 blocks spread evenly over them.

    Args:
        files: By a name that they keep where they are moved.

    Returns:
        Hexadecimal SHA-256; `None` for no files.

    Raises:
        InputError: One cannot be read.
    """
    if not files:
        return None
    digest = hashlib.sha256()
    try:
        sizes = [path.stat().st_size for path in files.values()]
        for name, size in zip(files, sizes, strict=True):
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        ends, paths = list(accumulate(sizes)), list(files.values())
        num_blocks = -(-ends[-1] // _BLOCK)
        if num_blocks <= _MOST_BLOCKS:
            for path in paths:
                with open_regular(path) as file:
                    digest.update(file.read())
            return digest.hexdigest()
        for number in range(_MOST_BLOCKS):
            position = number * ends[-1] // _MOST_BLOCKS
            index = bisect_right(ends, position)
            with open_regular(paths[index]) as file:
                file.seek(position - (ends[index] - sizes[index]))
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
