"""Read windows of a circular vector into a tensor, and add a tensor back into its windows.

The plain torch kernels of RANDOMFOLD. A block is a row of windows of one length, side by side in
the tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LONG_WINDOW", "Block", "add_block", "add_parts", "read_block", "scale_segments"]

# From this many slots on, whole rows are added to their windows one after the other; below, the
# windows with equal starts are summed first, which takes 2 m^2 numbers.
LONG_WINDOW = 1024
# From this many windows on, a table that a single pass over the output reads from is worth making.
_TABLE_WINDOWS = 4
# Segments of at least so many slots, on average, are scaled one by one; shorter ones by a vector of
# m factors.
_SEGMENT_SLOTS = 1 << 13
# Bounds the indices that are made where neither is possible: int64 elements.
_INDEX_NUMEL = 1 << 16


@dataclass(frozen=True)
class Block:
    """Windows of one length, one after the other."""

    offset: int
    """Place of the first window in the flattened tensor."""
    length: int
    """Weights in each window, at most m."""
    starts: np.ndarray
    """First slot of each window, in [0, m): int64, shape (windows,)."""
    signs: np.ndarray
    """-1 or +1 for each window: int64, shape (windows,)."""

    @property
    def stop(self) -> int:
        """Where the next block begins."""
        return self.offset + self.length * len(self.starts)

    def split(self, numel: int) -> Iterator["Block"]:
        """Cut it into blocks of whole windows, of at most `numel` weights if one has no more."""
        count = max(1, numel // self.length)
        for i in range(0, len(self.starts), count):
            part = slice(i, i + count)
            offset = self.offset + i * self.length
            yield Block(offset, self.length, self.starts[part], self.signs[part])


def read_block(slots: Tensor, block: Block, factor: float, out: Tensor) -> None:
    """Write factor * sign * slots[window] to the block's place in `out`, in one pass over it.

    Args:
        slots: Shape (m,).
        block: Of a tensor.
        factor: The same for all of its weights.
        out: The flattened tensor, of any floating dtype.
    """
    m, count = slots.numel(), len(block.starts)
    target = out[block.offset : block.stop]
    if count < _TABLE_WINDOWS:
        rows = zip(target.split(block.length), block.starts, block.signs, strict=True)
        for row, start, sign in rows:
            for a, b, at in _circular(int(start), block.length, m):
                torch.mul(slots[a:b], factor * float(sign), out=row[at : at + b - a])
        return
    # Every window, with either sign, is contiguous in this table.
    scaled = (slots * factor).to(out.dtype)
    table = torch.cat((scaled, scaled, -scaled, -scaled)).unfold(0, block.length, 1)
    index = torch.from_numpy(block.starts + np.where(block.signs > 0, 0, 2 * m))
    torch.index_select(table, 0, index.to(slots.device), out=target.view(count, block.length))


def add_block(weights: Tensor, block: Block, factor: float, out: Tensor) -> None:
    """Add factor * sign * weights to the windows of `out`: the adjoint of `read_block`.

    The order of the additions is fixed: no result depends on how threads are scheduled.

    Args:
        weights: The flattened tensor, contiguous, of any floating dtype.
        block: Of that tensor.
        factor: The same for all of its weights.
        out: Shape (m,), float32 or float64, changed in place.
    """
    m, count = out.numel(), len(block.starts)
    rows = weights[block.offset : block.stop].view(count, block.length)
    if count < _TABLE_WINDOWS:
        for row, start, sign in zip(rows, block.starts, block.signs, strict=True):
            for a, b, at in _circular(int(start), block.length, m):
                out[a:b].add_(row[at : at + b - a], alpha=factor * float(sign))
    elif out.device.type != "cpu":
        _add_gathered(rows.to(out.dtype), block, factor, out)
    elif m < LONG_WINDOW:
        _add_grouped(rows.to(out.dtype), block, factor, out)
    else:
        doubled = out.new_zeros(2 * m)
        flat = rows.to(out.dtype).view(-1)
        add_parts(flat, block.length, block.starts, block.signs, factor, doubled)
        out.add_(doubled[:m]).add_(doubled[m:])


def add_parts(
    flat: Tensor,
    lengths: int | list[int],
    starts: np.ndarray,
    signs: np.ndarray,
    factor: float,
    out: Tensor,
) -> None:
    """Add part after part, those of one sign in one call; the order of additions is fixed.

    Args:
        flat: The parts, one after the other.
        lengths: Of each part, or of all.
        starts: Where each part goes in `out`: int64, shape (parts,).
        signs: -1 or +1, shape (parts,).
        factor: Of all parts.
        out: Changed in place, of the dtype of `flat`; no window wraps.
    """
    parts, places = flat.split(lengths), starts.tolist()
    for sign in (1, -1):
        chosen = np.flatnonzero(signs == sign).tolist()
        if chosen:
            targets = [out.narrow(0, places[i], parts[i].numel()) for i in chosen]
            # PyTorch has no public name for an addition of lists of tensors.
            torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
                targets, [parts[i] for i in chosen], alpha=factor * sign
            )


def scale_segments(
    slots: Tensor, factors: Tensor, lengths: Tensor, out: Tensor | None = None
) -> Tensor:
    """Multiply every slot by the factor of its segment.

    Args:
        slots: Shape (m,).
        factors: Shape (segments,), of the same dtype and device.
        lengths: Slots of each segment: int64 or int32, shape (segments,).
        out: Where to put the result, a new tensor if not given; may be `slots`.

    Returns:
        Shape (m,).
    """
    count, m = len(factors), slots.numel()
    if count in (1, m):
        return torch.mul(slots, factors, out=out)
    if count * _SEGMENT_SLOTS > m:
        repeated = torch.repeat_interleave(factors, lengths.to(slots.device), output_size=m)
        return torch.mul(slots, repeated, out=out)
    out = slots.clone() if out is None else out.copy_(slots)
    # PyTorch has no public name for a multiplication of lists of tensors.
    torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
        out.split(lengths.tolist()), factors.tolist()
    )
    return out


def _add_grouped(rows: Tensor, block: Block, factor: float, out: Tensor) -> None:
    """Sum the rows with the same start, then the sums along the diagonals of a matrix."""
    m = out.numel()
    sums = out.new_zeros(m, 2 * m)
    for sign in (1, -1):
        chosen = torch.from_numpy(np.flatnonzero(block.signs == sign))
        starts = torch.from_numpy(block.starts)[chosen]
        sums[:, : block.length].index_add_(0, starts, rows[chosen], alpha=factor * sign)
    # Row r of the view is row r of `sums`, moved right by r: what it takes from the row before
    # is zero.
    moved = sums.as_strided((m, 2 * m), (2 * m - 1, 1)).sum(0)
    out.add_(moved[:m]).add_(moved[m:])


def _add_gathered(rows: Tensor, block: Block, factor: float, out: Tensor) -> None:
    """Gather for every slot what it gets from each row, a few rows at a time."""
    m = out.numel()
    slots = torch.arange(m, device=out.device)
    step = max(1, _INDEX_NUMEL // m)
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        starts = torch.from_numpy(block.starts[part]).to(out.device)[:, None]
        signs = torch.from_numpy(block.signs[part]).to(out.device, out.dtype)[:, None]
        positions = slots - starts
        positions += (positions < 0) * m
        inside = positions < block.length
        found = torch.gather(rows[part], 1, positions.clamp_(max=block.length - 1))
        out.add_((found * (signs * inside)).sum(0), alpha=factor)


def _circular(start: int, length: int, m: int) -> Iterator[tuple[int, int, int]]:
    """Cut a window of a circular vector: slices [a, b) and where each begins in the window."""
    first = min(length, m - start)
    yield start, start + first, 0
    if length > first:
        yield 0, length - first, first
