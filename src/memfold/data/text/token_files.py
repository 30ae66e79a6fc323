"""Flat files of tokens, memory-mapped: with a header of 256 int32, without, or NumPy's.

The header is that of modded-nanogpt's files: a magic number, a version, the number of tokens. Its
version 1 has uint16; version 2 here has uint32, for vocabularies above 65,536.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memfold.data.source_files import first_line
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["Dtype", "map_any", "map_tokens", "write_tokens"]

Dtype = Literal["uint16", "uint32"]
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
    header, size = _head_of(path)
    if not _is_header(header):
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


def map_any(path: Path, dtype: Dtype | None) -> NDArray[np.unsignedinteger]:
    """Return the tokens (N,) of a file of any kind, memory-mapped.

    Args:
        path: A .npy file of one dimension, or a flat file.
        dtype: Of a flat file without a header; `None`: it has one.

    Raises:
        InputError: It is missing or damaged, or of another kind.
    """
    if path.suffix == ".npy":
        return _map_array(path)
    if dtype is None:
        try:
            return map_tokens(path)
        except InputError as error:
            raise InputError(f"{error}; data.dtype=uint16 reads a file without a header") from error
    header, size = _head_of(path)
    if _is_header(header):
        raise InputError(f"{path}: has a header that says what it holds; leave data.dtype out")
    count, left = divmod(size, np.dtype(dtype).itemsize)
    if left or not count:
        raise InputError(f"{path}: {size} bytes are no whole number of {dtype}, at least one")
    return np.memmap(path, dtype=dtype, mode="c", shape=(count,))


def _map_array(path: Path) -> NDArray[np.unsignedinteger]:
    try:
        tokens = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: {first_line(error)}; expected an array of tokens") from error
    if not isinstance(tokens, np.ndarray):
        raise InputError(f"{path}: is an archive; expected one array of tokens (N,)")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(
            f"{path}: is {tokens.dtype} of shape {tokens.shape}; expected whole numbers (N,)"
        )
    if len(tokens) and tokens.min() < 0:
        raise InputError(f"{path}: token {tokens.min()} at place {tokens.argmin()} is negative")
    return tokens


def _head_of(path: Path) -> tuple[NDArray[np.int32], int]:
    """Return what may be a header, and the size of the file in bytes."""
    try:
        with open_regular(path) as file:
            head = file.read(4 * _HEADER)
            size = file.seek(0, 2)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a file of tokens") from error
    return np.frombuffer(head[: len(head) // 4 * 4], dtype=np.int32), size


def _is_header(header: NDArray[np.int32]) -> bool:
    return len(header) == _HEADER and header[0] == _MAGIC and header[1] in _DTYPES
