"""Kept entries as the gaps between them, in bytes that are worth coding.

The entries of all tensors that are kept in part lie one after the other, in order; a gap is the
number of entries that are dropped between one that is kept and the one before. A byte below 255
ends a gap: it is the sum of its bytes. Where a share p is kept at random, gaps are geometric
numbers, and coded by their frequencies they take what the information theory asks for: 4.7 bits
at p = 0.1, where indices take 10 and more.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from memfold.errors import InputError

__all__ = ["from_gaps", "to_gaps"]

_MORE = 255


def to_gaps(positions: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Write kept positions as gaps.

    Args:
        positions: int64, flat and increasing, of each tensor.
        sizes: Numbers of entries of the tensors.

    Returns:
        uint8 of shape (bytes,), on the CPU.
    """
    counts = [len(places) for places in positions]
    starts = [0, *accumulate(_partial(counts, sizes))]
    kept = [
        places.cpu() + start
        for places, size, start in zip(positions, sizes, starts[:-1], strict=True)
        if 0 < len(places) < size
    ]
    if not kept:
        return torch.empty(0, dtype=torch.uint8)
    gaps = np.diff(torch.cat(kept).numpy(), prepend=-1) - 1
    ends = np.cumsum(gaps // _MORE + 1) - 1
    symbols = np.full(ends[-1] + 1, _MORE, dtype=np.uint8)
    symbols[ends] = gaps % _MORE
    return torch.from_numpy(symbols)


def from_gaps(symbols: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Read what `to_gaps` wrote: the flat positions of each tensor, int64, on the CPU.

    Args:
        symbols: uint8 of shape (bytes,), on the CPU.
        counts: Numbers of kept entries of the tensors, each in 0..size.
        sizes: Numbers of their entries.

    Raises:
        InputError: These are not the gaps of so many entries.
    """
    values = symbols.numpy()
    ends = np.flatnonzero(values != _MORE)
    partial = _partial(counts, sizes)
    expected = sum(count for count, size in zip(counts, partial, strict=True) if size)
    if len(ends) != expected or (len(values) and ends[-1:] != [len(values) - 1]):
        raise InputError(f"gaps between kept weights are damaged: {len(ends)} of {expected}")
    sums = np.cumsum(values, dtype=np.int64)[ends]
    kept = torch.from_numpy(sums + np.arange(len(sums)))
    positions, done = [], 0
    for count, size, start in zip(counts, partial, [0, *accumulate(partial)][:-1], strict=True):
        if not size:
            positions.append(torch.arange(count))
            continue
        places = kept[done : done + count] - start
        if int(places[0]) < 0 or int(places[-1]) >= size:
            raise InputError("gaps between kept weights are damaged: one leads out of its tensor")
        positions.append(places)
        done += count
    return positions


def _partial(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Sizes of the tensors, 0 where nothing or everything is kept: nothing is to be said there."""
    return [s if 0 < count < s else 0 for count, s in zip(counts, sizes, strict=True)]
