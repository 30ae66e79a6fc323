"""The rows of one matrix as windows of the circular vector."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from memfold.errors import InputError
from memfold.strategies.sharing.fold import Block

__all__ = ["Pieces", "RowLayout", "WholeRows", "Windows"]


@dataclass(frozen=True)
class Windows:
    """Where one flattened tensor lies in the vector; int64 arrays of shape (windows,).

    Window i holds the weights offsets[i], ..., offsets[i] + lengths[i] - 1 of the tensor, in the
    slots starts[i], starts[i] + 1, ... modulo m, all with sign signs[i]. Windows follow each other
    without gaps, and none is longer than m.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    """In [0, m)."""
    signs: np.ndarray
    """-1 or +1."""

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True)
class WholeRows:
    """Groups of consecutive rows inside one window; int64 arrays of shape (groups,).

    Group i holds the rows firsts[i], ..., firsts[i] + counts[i] - 1, one after the other in the
    slots from starts[i] on: a (counts[i], columns) matrix in the doubled vector.
    """

    firsts: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    """In [0, m)."""
    signs: np.ndarray
    """-1 or +1."""

    def __len__(self) -> int:
        return len(self.firsts)


@dataclass(frozen=True)
class Pieces:
    """The parts of straddling rows, in order; int64 arrays of shape (pieces,)."""

    rows: np.ndarray
    """Place of the row among the straddling rows, ascending."""
    columns: np.ndarray
    """First column."""
    lengths: np.ndarray
    starts: np.ndarray
    """In [0, m)."""
    signs: np.ndarray
    """-1 or +1."""


@dataclass(frozen=True)
class RowLayout:
    """Where each row of a (num_rows, columns) matrix lies in a vector of num_slots.

    A row inside one window is whole; a row that the end of a window cuts straddles.
    """

    num_rows: int
    columns: int
    num_slots: int
    windows: Windows
    whole: WholeRows
    straddling: np.ndarray
    """The rows that are not whole, ascending: int64."""
    pieces: Pieces

    @classmethod
    def of(cls, windows: Windows, *, columns: int, num_slots: int) -> "RowLayout":
        """Derive the layout of a matrix from the windows of its flattened elements.

        Args:
            windows: Of the matrix, flattened row after row.
            columns: Elements in each row.
            num_slots: The m of the circular vector.

        Raises:
            InputError: The windows do not hold a whole number of rows, or one is longer than m.
        """
        numel = int(windows.lengths.sum())
        if columns < 1 or numel % columns:
            raise InputError(f"{numel} weights are no whole number of rows of {columns}")
        longest = int(windows.lengths.max(initial=0))
        if longest > num_slots:
            raise InputError(f"a window of {longest} is longer than m = {num_slots}")
        num_rows = numel // columns
        whole = _whole_rows(windows, columns, num_slots)
        is_whole = np.zeros(num_rows + 1, dtype=np.int64)
        np.add.at(is_whole, whole.firsts, 1)
        np.add.at(is_whole, whole.firsts + whole.counts, -1)
        straddling = np.flatnonzero(np.cumsum(is_whole[:-1]) == 0)
        pieces = _pieces(windows, straddling, columns, num_slots)
        return cls(num_rows, columns, num_slots, windows, whole, straddling, pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of all index arrays."""
        parts = (self.windows, self.whole, self.pieces)
        arrays = [array for part in parts for array in vars(part).values()]
        return sum(array.nbytes for array in (*arrays, self.straddling))

    def unwrapped(self) -> "RowLayout":
        """Cut the windows that go on from the last slot to the first there: more rows straddle."""
        windows, m = self.windows, self.num_slots
        wraps = np.flatnonzero(windows.starts + windows.lengths > m)
        cuts = windows.offsets[wraps] + m - windows.starts[wraps]
        offsets = np.insert(windows.offsets, wraps + 1, cuts)
        lengths = np.diff(offsets, append=self.num_rows * self.columns)
        starts = np.insert(windows.starts, wraps + 1, 0)
        signs = np.insert(windows.signs, wraps + 1, windows.signs[wraps])
        cut = Windows(offsets=offsets, lengths=lengths, starts=starts, signs=signs)
        return RowLayout.of(cut, columns=self.columns, num_slots=m)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The windows, those of equal length side by side."""
        found = self.windows
        bounds = [0, *(np.flatnonzero(np.diff(found.lengths)) + 1).tolist(), len(found)]
        return tuple(
            Block(int(found.offsets[a]), int(found.lengths[a]), found.starts[a:b], found.signs[a:b])
            for a, b in pairwise(bounds)
            if b > a
        )

    @cached_property
    def row_starts(self) -> np.ndarray:
        """First slot of each row, 0 for straddling rows: int64, shape (num_rows,)."""
        return _per_row(self, self.whole.starts, step=self.columns) % self.num_slots

    @cached_property
    def row_signs(self) -> np.ndarray:
        """Sign of each row, 0 for straddling rows: int64, shape (num_rows,)."""
        return _per_row(self, self.whole.signs, step=0)

    def blocks_within(self, begin: int, end: int) -> Iterator[Block]:
        """Cut from `blocks` the flat elements [begin, end); offsets then count from `begin`."""
        for block in self.blocks:
            a, b = max(begin, block.offset), min(end, block.stop)
            if a >= b:
                continue
            first, skipped = divmod(a - block.offset, block.length)
            if skipped:
                stop = min(b, a - skipped + block.length)
                yield self._part(block, first, skipped, a - begin, stop - a)
                a, first = stop, first + 1
            count, rest = divmod(b - a, block.length)
            if count:
                chosen = slice(first, first + count)
                yield Block(a - begin, block.length, block.starts[chosen], block.signs[chosen])
            if rest:
                yield self._part(block, first + count, 0, b - rest - begin, rest)

    def _part(self, block: Block, window: int, skipped: int, offset: int, length: int) -> Block:
        starts = (block.starts[window : window + 1] + skipped) % self.num_slots
        return Block(offset, length, starts, block.signs[window : window + 1])


def _whole_rows(windows: Windows, columns: int, num_slots: int) -> WholeRows:
    firsts = -(-windows.offsets // columns)
    counts = (windows.offsets + windows.lengths) // columns - firsts
    starts = (windows.starts + firsts * columns - windows.offsets) % num_slots
    found = counts > 0
    return WholeRows(firsts[found], counts[found], starts[found], windows.signs[found])


def _pieces(windows: Windows, straddling: np.ndarray, columns: int, num_slots: int) -> Pieces:
    begins = straddling * columns
    cuts = windows.offsets[windows.offsets % columns != 0]
    flat = np.union1d(begins, cuts)
    rows = np.searchsorted(straddling, flat // columns)
    ends = np.append(flat[1:], windows.lengths.sum())
    ends = np.minimum(ends, (flat // columns + 1) * columns)
    window = np.searchsorted(windows.offsets, flat, side="right") - 1
    starts = (windows.starts[window] + flat - windows.offsets[window]) % num_slots
    return Pieces(rows, flat % columns, ends - flat, starts, windows.signs[window])


def _per_row(layout: RowLayout, of_group: np.ndarray, step: int) -> np.ndarray:
    """Repeat one number of each group for its rows, moving by `step` from row to row."""
    whole = layout.whole
    rows = np.repeat(whole.firsts, whole.counts)
    total = np.arange(len(rows)) - np.repeat(np.cumsum(whole.counts) - whole.counts, whole.counts)
    result = np.zeros(layout.num_rows, dtype=np.int64)
    result[rows + total] = np.repeat(of_group, whole.counts) + step * total
    return result
