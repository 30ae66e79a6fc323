"""Which entries of a tensor are kept, in the fewest bytes.

A tensor of N entries, k of them kept, has R rows (its first dimension) of C entries. The formats:

    none, all   0 bytes                                            nothing or everything is kept
    bitmask     ceil(N / 8)                                        one bit per entry
    indices     ceil(k ceil(log2 N) / 8)                           flat positions
    csr         ceil((R ceil(log2(C + 1)) + k ceil(log2 C)) / 8)   entries of all rows, columns

The cheapest follows from k and the shape alone, so it is not stored. Indices beat the bitmask below
a density of 1 / ceil(log2 N). All numbers are written without gaps, the lowest bit first, and the
last byte is filled up with zeros. Working memory: a byte per entry of the tensor and some tens of
bytes per kept one.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memfold.errors import InputError

__all__ = ["FORMATS", "cheapest", "decode", "encode"]

FORMATS = ("none", "all", "bitmask", "indices", "csr")


def cheapest(kept: int, shape: Sequence[int]) -> tuple[str, int]:
    """Return the format that takes the fewest bytes; of several, the first in `FORMATS`.

    Args:
        kept: Number of kept entries.
        shape: Of the tensor.

    Returns:
        Name of the format, and the exact bytes that `encode` returns.

    Raises:
        InputError: `kept` is negative or larger than the tensor.
    """
    numel = prod(shape)
    if not 0 <= kept <= numel:
        raise InputError(f"{kept} kept entries do not fit a tensor of {numel}")
    if kept in (0, numel):
        return ("all" if kept else "none"), 0
    rows, cols = _rows_and_columns(shape)
    num_bits = {
        "bitmask": numel,
        "indices": kept * _width(numel),
        "csr": rows * _width(cols + 1) + kept * _width(cols),
    }
    name = min(num_bits, key=lambda name: -(-num_bits[name] // 8))
    return name, -(-num_bits[name] // 8)


def encode(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Write the positions of the kept entries in the cheapest format.

    Args:
        positions: int64, flat (row-major), increasing.
        shape: Of the tensor that they point into.

    Returns:
        uint8 of shape (bytes,), on the CPU.

    Raises:
        InputError: Positions repeat, are not in order or point outside the tensor.
    """
    where = positions.detach().cpu().numpy()
    _check_positions(where, prod(shape))
    name, _ = cheapest(len(where), shape)
    if name in ("none", "all"):
        return torch.empty(0, dtype=torch.uint8)
    if name == "bitmask":
        bits = np.zeros(prod(shape), dtype=np.uint8)
        bits[where] = 1
    elif name == "indices":
        bits = _to_bits(where, _width(prod(shape)))
    else:
        rows, cols = _rows_and_columns(shape)
        counts = np.bincount(where // cols, minlength=rows)
        bits = np.concatenate(
            [_to_bits(counts, _width(cols + 1)), _to_bits(where % cols, _width(cols))]
        )
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def decode(data: Tensor, kept: int, shape: Sequence[int]) -> Tensor:
    """Read what `encode` wrote.

    Args:
        data: uint8 of shape (bytes,), on any device.
        kept: Number of kept entries.
        shape: Of the tensor.

    Returns:
        int64 of shape (kept,), increasing, on the CPU.

    Raises:
        InputError: The bytes are not what `encode` makes of any `kept` positions in this shape.
    """
    numel = prod(shape)
    name, num_bytes = cheapest(kept, shape)
    if data.dtype != torch.uint8 or data.shape != (num_bytes,):
        raise InputError(
            f"positions of {kept} of {numel} entries must be {num_bytes} bytes ({name}), got "
            f"{data.dtype} of shape {list(data.shape)}"
        )
    if name in ("none", "all"):
        return torch.arange(kept)
    bits = np.unpackbits(data.cpu().numpy(), bitorder="little")
    if name == "bitmask":
        where, used = np.flatnonzero(bits[:numel]), numel
    elif name == "indices":
        used = kept * _width(numel)
        where = _from_bits(bits[:used], _width(numel))
    else:
        where, used = _decode_csr(bits, kept, shape)
    if len(where) != kept or bits[used:].any():
        raise InputError(f"stored positions ({name}) are damaged: not {kept} of {numel} entries")
    _check_positions(where, numel)
    return torch.from_numpy(where)


def _decode_csr(bits: NDArray[np.uint8], kept: int, shape: Sequence[int]) -> tuple[NDArray, int]:
    """Return the flat positions, none where the counts or columns are wrong, and the bits read."""
    rows, cols = _rows_and_columns(shape)
    start = rows * _width(cols + 1)
    used = start + kept * _width(cols)
    counts = _from_bits(bits[:start], _width(cols + 1))
    columns = _from_bits(bits[start:used], _width(cols))  # one column: never as cheap as a bitmask
    if counts.sum() != kept or (columns >= cols).any():
        return np.empty(0, np.int64), used
    return np.repeat(np.arange(rows) * cols, counts) + columns, used


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _width(choices: int) -> int:
    """Bits that tell `choices` numbers apart: ceil(log2(choices))."""
    return (choices - 1).bit_length()


def _to_bits(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Write numbers (n,) as n * width zeros and ones, the lowest bit of each first."""
    as_bytes = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(as_bytes, axis=1, count=width, bitorder="little").ravel()


def _from_bits(bits: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    """Undo `_to_bits`, for a width of at least 1."""
    packed = np.packbits(bits.reshape(-1, width), axis=1, bitorder="little")
    as_bytes = np.zeros((len(packed), 8), dtype=np.uint8)
    as_bytes[:, : packed.shape[1]] = packed
    return as_bytes.view("<i8").ravel().astype(np.int64, copy=False)


def _check_positions(where: NDArray[np.int64], numel: int) -> None:
    if len(where) and not (where[0] >= 0 and where[-1] < numel and (np.diff(where) > 0).all()):
        raise InputError(f"positions must be increasing and within a tensor of {numel} entries")
