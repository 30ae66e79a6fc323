"""Flat files of tokens, memory-mapped: 256 int32 of header, then uint16 or uint32.

The header is that of modded-nanogpt's files: a magic number, a version, the number of tokens. Its
version 1 has uint16; version 2 here has uint32, for vocabularies above 65,536.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["map_tokens", "write_tokens"]

_MAGIC = 20240520
_HEADER = 256
_DTYPES: dict[int, type[np.unsignedinteger]] = {1: np.uint16, 2: np.uint32}


def write_tokens(path: Path, tokens: NDArray[np.unsignedinteger]) -> None:
    """Write tokens (N,), as uint16 unless they are uint32."""
    version = 2 if tokens.dtype == np.uint32 else 1
    header = np.zeros(_HEADER, dtype=np.int32)
    header[:3] = _MAGIC, version, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(_DTYPES[version]).tobytes())


def map_tokens(path: Path) -> NDArray[np.unsignedinteger]:
    """Return the tokens (N,) of a file, memory-mapped.

    Raises:
        InputError: It is missing, no such file, or shorter than its header says.
    """
    try:
        with open_regular(path) as file:
            header = np.frombuffer(file.read(4 * _HEADER), dtype=np.int32)
            size = file.seek(0, 2)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a file of tokens") from error
    if len(header) < _HEADER or header[0] != _MAGIC or header[1] not in _DTYPES:
        raise InputError(
            f"{path}: is no file of tokens: 256 int32 (magic {_MAGIC}, version 1 or 2, count), "
            "then uint16 or uint32"
        )
    dtype, count = np.dtype(_DTYPES[int(header[1])]), int(header[2])
    expected = 4 * _HEADER + count * dtype.itemsize
    if size != expected or count < 0:
        raise InputError(f"{path}: {size} bytes, expected {expected} for its {count} tokens")
    # Copy-on-write: torch wants writable memory, the file must stay as it is.
    return np.memmap(path, dtype=dtype, mode="c", offset=4 * _HEADER, shape=(count,))
