"""Products with the rows that the end of a run cuts."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.prepared import Prepared

__all__ = ["StraddlingRows"]

# Elements of the matrix that is built at a time.
_SCRATCH_NUMEL = 1 << 18


class StraddlingRows:
    """Builds a few straddling rows at a time.

    Most have two pieces. Such a row is a window of its seam: the `columns` slots that end where
    its first piece does, followed by the `columns` slots from the start of its second piece on.
    """

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        pieces = layout.pieces
        self._bounds = np.searchsorted(pieces.rows, np.arange(len(layout.straddling) + 1))
        self._has_seams = layout.columns <= layout.num_slots and bool(
            (np.diff(self._bounds) == 2).all()
        )

    def product(self, prepared: Prepared, x: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * x @ W.T to the columns of y that straddling rows fill."""
        for begin, end, rows in self._parts(y.device):
            matrix = self._build(prepared, begin, end, x.dtype)
            y.index_copy_(1, rows, (x @ matrix.T).mul_(factor))

    def transposed_product(self, prepared: Prepared, g: Tensor, factor: float, y: Tensor) -> None:
        """Add factor * g @ W, W having these rows only, to y."""
        for begin, end, rows in self._parts(y.device):
            matrix = self._build(prepared, begin, end, g.dtype)
            y.addmm_(g.index_select(1, rows), matrix, alpha=factor)

    def add_gradient(self, g: Tensor, x: Tensor, factor: float, out: Tensor) -> None:
        """Add what these rows give to the doubled vector `out`, shape (2m,)."""
        pieces = self.layout.pieces
        for begin, end, rows in self._parts(out.device):
            gradient = (g.index_select(1, rows).T @ x).to(out.dtype)
            a, b = self._bounds[begin], self._bounds[end]
            lengths, starts = pieces.lengths[a:b].tolist(), pieces.starts[a:b].tolist()
            sources = gradient.view(-1).split(lengths)
            for sign in (1, -1):
                chosen = np.flatnonzero(pieces.signs[a:b] == sign).tolist()
                if chosen:
                    targets = [out.narrow(0, starts[i], lengths[i]) for i in chosen]
                    parts = [sources[i] for i in chosen]
                    torch._foreach_add_(targets, parts, alpha=factor * sign)

    def _parts(self, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        count = len(self.layout.straddling)
        step = max(1, _SCRATCH_NUMEL // self.layout.columns)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            yield begin, end, torch.from_numpy(self.layout.straddling[begin:end]).to(device)

    def _build(self, prepared: Prepared, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Build the straddling rows number `begin` to `end`: shape (end - begin, columns)."""
        table = prepared.signed(dtype)
        columns, m, pieces = self.layout.columns, self.layout.num_slots, self.layout.pieces
        a, b = self._bounds[begin], self._bounds[end]
        starts = pieces.starts[a:b] + np.where(pieces.signs[a:b] > 0, 0, 2 * m)
        if not self._has_seams:
            parts = [
                table[start : start + length]
                for start, length in zip(starts.tolist(), pieces.lengths[a:b].tolist(), strict=True)
            ]
            return torch.cat(parts).view(-1, columns)
        cuts = pieces.lengths[a:b:2]
        heads = (pieces.starts[a:b:2] + cuts - columns) % m
        seams = np.stack((heads + starts[::2] - pieces.starts[a:b:2], starts[1::2]), axis=1)
        index = torch.from_numpy(seams.reshape(-1)).to(table.device)
        built = table.unfold(0, columns, 1).index_select(0, index).view(-1)
        windows = 2 * columns * np.arange(end - begin) + columns - cuts
        return built.unfold(0, columns, 1).index_select(
            0, torch.from_numpy(windows).to(table.device)
        )
