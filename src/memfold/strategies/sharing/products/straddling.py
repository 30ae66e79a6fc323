"""Products with the rows that the end of a window cuts."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.fold import add_parts
from memfold.strategies.sharing.products.costs import SCRATCH_NUMEL
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.prepared import Prepared

__all__ = ["StraddlingRows"]


class StraddlingRows:
    """Builds a few straddling rows at a time.

    Where no piece wraps, they are put together piece by piece from the plain slots. Other layouts
    may have many straddling rows, most of two pieces. Such a row is a window of its seam: the
    `columns` slots that end where its first piece does, followed by the `columns` slots from the
    start of its second piece on.
    """

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        self._pieces = pieces = layout.pieces
        self._bounds = np.searchsorted(pieces.rows, np.arange(len(layout.straddling) + 1))
        self._wraps = bool((pieces.starts + pieces.lengths > layout.num_slots).any())
        self._has_seams = (
            self._wraps
            and layout.columns <= layout.num_slots
            and bool((np.diff(self._bounds) == 2).all())
        )

    def product(self, prepared: Prepared, x: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * x @ W.T to the columns of y that straddling rows fill."""
        if prepared.lasts and len(self.layout.straddling):
            rows = torch.from_numpy(self.layout.straddling).to(y.device)
            y.index_copy_(1, rows, (x @ self._kept(prepared, x.dtype).T).mul_(factor))
            return
        for begin, end, rows in self._parts(y.device):
            matrix = self._build(prepared, begin, end, x.dtype)
            y.index_copy_(1, rows, (x @ matrix.T).mul_(factor))

    def transposed_product(self, prepared: Prepared, g: Tensor, factor: float, y: Tensor) -> None:
        """Add factor * g @ W, W having these rows only, to y."""
        for begin, end, rows in self._parts(y.device):
            matrix = self._build(prepared, begin, end, g.dtype)
            y.add_(g.index_select(1, rows) @ matrix, alpha=factor)

    def add_gradient(self, g: Tensor, x: Tensor, factor: float, out: Tensor) -> None:
        """Add what these rows give to the doubled vector `out`, shape (2m,); (m,) if none wraps."""
        pieces = self._pieces
        for begin, end, rows in self._parts(out.device):
            gradient = (g.index_select(1, rows).T @ x).to(out.dtype)
            a, b = self._bounds[begin], self._bounds[end]
            lengths, starts = pieces.lengths[a:b].tolist(), pieces.starts[a:b]
            add_parts(gradient.view(-1), lengths, starts, pieces.signs[a:b], factor, out)

    def _kept(self, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """Return all straddling rows, shape (straddling, columns), built once for these slots."""
        key = self, dtype
        if key not in prepared.rows:
            columns, device = self.layout.columns, prepared.slots.device
            matrix = torch.empty(len(self.layout.straddling), columns, dtype=dtype, device=device)
            for begin, end, _ in self._parts(device):
                matrix[begin:end] = self._build(prepared, begin, end, dtype)
            prepared.rows[key] = matrix
        return prepared.rows[key]

    def _parts(self, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        count = len(self.layout.straddling)
        step = max(1, SCRATCH_NUMEL // self.layout.columns)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            yield begin, end, torch.from_numpy(self.layout.straddling[begin:end]).to(device)

    def _build(self, prepared: Prepared, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Build the straddling rows number `begin` to `end`: shape (end - begin, columns)."""
        a, b = self._bounds[begin], self._bounds[end]
        return (self._join_seams if self._has_seams else self._join_pieces)(prepared, a, b, dtype)

    def _join_pieces(self, prepared: Prepared, a: int, b: int, dtype: torch.dtype) -> Tensor:
        table, pieces = (prepared.doubled if self._wraps else prepared.plain)(dtype), self._pieces
        slices = zip(pieces.starts[a:b].tolist(), pieces.lengths[a:b].tolist(), strict=True)
        parts = [table[start : start + length] for start, length in slices]
        for i in np.flatnonzero(pieces.signs[a:b] < 0).tolist():
            parts[i] = -parts[i]
        return torch.cat(parts).view(-1, self.layout.columns)

    def _join_seams(self, prepared: Prepared, a: int, b: int, dtype: torch.dtype) -> Tensor:
        columns, m, pieces = self.layout.columns, self.layout.num_slots, self._pieces
        table = prepared.signed(dtype).unfold(0, columns, 1)
        cuts = pieces.lengths[a:b:2]
        heads = (pieces.starts[a:b:2] + cuts - columns) % m
        seams = np.stack((heads, pieces.starts[a + 1 : b : 2]), axis=1)
        index = seams.reshape(-1) + np.where(pieces.signs[a:b] > 0, 0, 2 * m)
        built = table.index_select(0, torch.from_numpy(index).to(table.device)).view(-1)
        windows = torch.from_numpy(2 * columns * np.arange(len(cuts)) + columns - cuts)
        return built.unfold(0, columns, 1).index_select(0, windows.to(table.device))
