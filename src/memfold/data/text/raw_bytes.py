"""Bytes of text from files and archives."""

import hashlib
import zipfile
from pathlib import Path

from memfold.data.source_files import first_line
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["read_bytes", "read_zipped"]

_MAX_BYTES = 4 * 2**30
"""Of a text, which is held in memory."""


def read_bytes(path: Path, checksum: str | None = None) -> bytes:
    """Read a file of text.

    Args:
        path: The file.
        checksum: "sha256:..." that it must have; `None` for any.

    Raises:
        InputError: It cannot be read, is empty or too large, or is another file.
    """
    try:
        with open_regular(path) as file:
            content: bytes = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a text file") from error
    if not content:
        raise InputError(f"{path}: is empty; expected text")
    if len(content) > _MAX_BYTES:
        raise InputError(f"{path}: has more than {_MAX_BYTES} bytes; see data=tokens")
    if checksum is not None and f"sha256:{hashlib.sha256(content).hexdigest()}" != checksum:
        raise InputError(f"{path}: is not the published file ({checksum}); delete it")
    return content


def read_zipped(archive: Path, member: str) -> bytes:
    """Read a file of text in a .zip.

    Raises:
        InputError: The archive is damaged, does not hold it, or holds too much.
    """
    try:
        with (
            open_regular(archive) as file,
            zipfile.ZipFile(file) as zipped,
            zipped.open(member) as stream,
        ):
            content = stream.read(_MAX_BYTES)
    except Exception as error:  # encryption, unknown methods: each has its own errors
        raise InputError(
            f"{archive}: {first_line(error)}; expected an archive with {member}; delete it to "
            "download it again"
        ) from error
    if not content:
        raise InputError(f"{archive}: {member} is empty")
    return content
