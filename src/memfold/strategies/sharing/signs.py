"""Random signs, each the product of an entry of one short table and an entry of another."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OuterSigns"]

# Elements of a matrix that are multiplied at a time: both passes find them in a cache.
_CACHED_NUMEL = 1 << 17


@dataclass(frozen=True)
class OuterSigns:
    """The matrix rows[a] columns[b] of signs, flattened, from its element number `first` on."""

    rows: Tensor
    """-1 or +1, shape (rows,): int8, but for what `times` returns."""
    columns: Tensor
    """-1 or +1, shape (columns,): int8, but for what `times` returns."""
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both tables."""
        return self.rows.nbytes + self.columns.nbytes

    def to(self, device: torch.device) -> "OuterSigns":
        """Return the same signs on a device."""
        return OuterSigns(self.rows.to(device), self.columns.to(device), self.first)

    def expand(self, begin: int, end: int) -> Tensor:
        """Return signs number begin, ..., end - 1: int8, shape (end - begin,)."""
        width = len(self.columns)
        first, last = self.first + begin, self.first + end
        rows = self.rows[first // width : -(-last // width)]
        start = first // width * width
        return (rows[:, None] * self.columns).flatten()[first - start : last - start]

    def times(self, factor: float, like: Tensor) -> "OuterSigns":
        """Return the signs times a factor, in the dtype of a tensor on their device."""
        return OuterSigns(self.rows.to(like), (self.columns * factor).to(like), self.first)

    def multiply_(self, weights: Tensor, begin: int = 0) -> None:
        """Multiply weights number begin, begin + 1, ... by their signs, in place.

        Args:
            weights: Shape (any,), contiguous, of any floating dtype.
            begin: Number of the first one.
        """
        signs = OuterSigns(self.rows.to(weights), self.columns.to(weights), self.first)
        for start, stop, rows, columns in signs.cut(begin, begin + len(weights), _CACHED_NUMEL):
            part = weights[start - begin : stop - begin].view(len(rows), -1)
            part.mul_(columns)
            part.mul_(rows)

    def cut(
        self, begin: int, end: int, numel: int | None = None
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Cut weights number begin, ..., end - 1 into matrices with the tables for each.

        Args:
            begin: Number of the first weight.
            end: Number after the last one.
            numel: Weights in a matrix, at most, if a row has no more.

        Yields:
            Numbers of the first weight and after the last one, the signs of the rows, of shape
            (rows, 1), and of the columns, of shape (columns,).
        """
        width = len(self.columns)
        step = max(1, (numel or end - begin) // width)
        while begin < end:
            row, column = divmod(self.first + begin, width)
            whole = min(step, (end - begin) // width) if column == 0 else 0
            stop = begin + (whole * width if whole else min(end - begin, width - column))
            columns = self.columns[column : column + (stop - begin) // max(1, whole)]
            yield begin, stop, self.rows[row : row + max(1, whole), None], columns
            begin = stop
