"""Random signs, each the product of an entry of one short table and an entry of another."""

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
    """-1 or +1: int8, shape (rows,)."""
    columns: Tensor
    """-1 or +1: int8, shape (columns,)."""
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

    def multiply_(self, weights: Tensor, begin: int = 0) -> None:
        """Multiply weights number begin, begin + 1, ... by their signs, in place.

        Args:
            weights: Shape (any,), contiguous, of any floating dtype.
            begin: Number of the first one.
        """
        rows, columns = self.rows.to(weights), self.columns.to(weights)
        width, count = len(columns), weights.numel()
        step = max(1, _CACHED_NUMEL // width)
        done = 0
        while done < count:
            row, column = divmod(self.first + begin + done, width)
            whole = min(step, (count - done) // width) if column == 0 else 0
            size = whole * width if whole else min(count - done, width - column)
            part = weights[done : done + size].view(max(1, whole), -1)
            part.mul_(columns[column : column + part.shape[1]])
            part.mul_(rows[row : row + len(part), None])
            done += size
