"""Products with a matrix whose rows are read through views of the vector.

Where windows hold many rows, each is a matrix in the vector, and goes to the matrix product as a
view; a row that the vector's end cuts is handled as a straddling row. Shorter windows are copied,
as many as fit in a cache, into a scratch matrix. In neither case is the weight built; the vector
and the scratch stay in the caches, so that less memory traffic is left than with a built weight.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.fold import LONG_WINDOW, Block, add_block, add_parts
from memfold.strategies.sharing.products.costs import SCRATCH_NUMEL, takes_views
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.prepared import Prepared
from memfold.strategies.sharing.products.straddling import StraddlingRows

__all__ = ["WindowProducts"]


class WindowProducts:
    """The products of one layout; see `memfold.strategies.sharing.products`."""

    def __init__(self, layout: RowLayout) -> None:
        self._takes_views = takes_views(layout)
        # Views that do not wrap need no doubled vector, which would take twice the slots' memory.
        self.layout = layout.unwrapped() if self._takes_views else layout
        self._straddling = StraddlingRows(self.layout)

    def product(self, prepared: Prepared, x: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * x @ W.T to y, shape (batch, num_rows)."""
        for begin, matrix, sign in self._matrices(prepared, x.dtype):
            target = y[:, begin : begin + len(matrix)]
            if len(x) == 1:
                torch.addmv(target[0], matrix, x[0], beta=0, alpha=factor * sign, out=target[0])
            else:
                target.addmm_(x, matrix.T, beta=0, alpha=factor * sign)
        if self._takes_views:
            self._straddling.product(prepared, x, factor, y)

    def transposed_product(self, prepared: Prepared, g: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * g @ W to y, shape (batch, columns), dtype of the slots."""
        # Parts of lower precision are summed in that of the slots.
        is_low, beta = g.dtype != y.dtype, 0
        if is_low:
            y.zero_()
        for begin, matrix, sign in self._matrices(prepared, g.dtype):
            rows = g[:, begin : begin + len(matrix)]
            if is_low:
                y.add_(rows @ matrix, alpha=factor * sign)
            else:
                y.addmm_(rows, matrix, beta=beta, alpha=factor * sign)
            beta = 1
        if self._takes_views:
            self._straddling.transposed_product(prepared, g, factor, y)

    def backward(
        self, prepared: Prepared, g: Tensor, x: Tensor, factor: float, out: Tensor, y: Tensor
    ) -> None:
        """Do both; there is nothing to share."""
        self.transposed_product(prepared, g, factor, y)
        self.add_gradient(prepared, g, x, factor, out)

    def add_gradient(
        self, prepared: Prepared, g: Tensor, x: Tensor, factor: float, out: Tensor
    ) -> None:
        """Add the gradient to `out`, shape (2m,), or (m,) where views are taken."""
        if not self._takes_views:
            self._add_copied(g, x, factor, out)
            return
        columns, whole = self.layout.columns, self.layout.whole
        groups = (whole.firsts, whole.counts, whole.starts, whole.signs)
        for first, count, start, sign in zip(*(a.tolist() for a in groups), strict=True):
            rows = g[:, first : first + count].T
            target = out[start : start + count * columns].view(count, columns)
            if x.dtype == out.dtype:
                target.addmm_(rows, x, alpha=factor * sign)
            else:
                target.add_(rows @ x, alpha=factor * sign)
        self._straddling.add_gradient(g, x, factor, out)

    def _matrices(
        self, prepared: Prepared, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, float]]:
        """Yield first row, rows and sign of parts of the matrix that hold for one iteration."""
        columns = self.layout.columns
        if self._takes_views:
            slots, whole = prepared.plain(dtype), self.layout.whole
            groups = (whole.firsts, whole.counts, whole.starts, whole.signs)
            for first, count, start, sign in zip(*(a.tolist() for a in groups), strict=True):
                window = slots[start : start + count * columns]
                yield first, window.view(count, columns), float(sign)
            return
        scratch = prepared.slots.new_empty(min(self._step, self.layout.num_rows) * columns).to(
            dtype
        )
        table = prepared.signed(dtype)
        for begin, end in self._chunks():
            flat = scratch[: (end - begin) * columns]
            for block in self.layout.blocks_within(begin * columns, end * columns):
                self._read(table, block, flat)
            yield begin, flat.view(end - begin, columns), 1.0

    @property
    def _step(self) -> int:
        return max(1, SCRATCH_NUMEL // self.layout.columns)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.layout.num_rows, self._step):
            yield begin, min(begin + self._step, self.layout.num_rows)

    def _read(self, table: Tensor, block: Block, flat: Tensor) -> None:
        index = block.starts + np.where(block.signs > 0, 0, 2 * self.layout.num_slots)
        target = flat[block.offset : block.stop]
        if len(index) == 1:
            target.copy_(table[int(index[0]) : int(index[0]) + block.length])
            return
        rows = torch.from_numpy(index).to(table.device)
        windows = table.unfold(0, block.length, 1)
        torch.index_select(windows, 0, rows, out=target.view(-1, block.length))

    def _add_copied(self, g: Tensor, x: Tensor, factor: float, out: Tensor) -> None:
        """Compute the weight's gradient as many rows at a time as the scratch holds."""
        columns = self.layout.columns
        folds = out.device.type != "cpu" or self.layout.num_slots < LONG_WINDOW
        scratch = x.new_empty(min(self._step, self.layout.num_rows), columns)
        for begin, end in self._chunks():
            gradient = torch.mm(g[:, begin:end].T, x, out=scratch[: end - begin])
            flat = gradient.to(out.dtype).view(-1)
            for block in self.layout.blocks_within(begin * columns, end * columns):
                if folds:
                    add_block(flat, block, factor, out[: self.layout.num_slots])
                else:
                    part = flat[block.offset : block.stop]
                    add_parts(part, block.length, block.starts, block.signs, factor, out)
