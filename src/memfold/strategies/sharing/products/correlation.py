"""Products with whole rows as circular correlations, by Fourier transforms of blocks.

Row r of W is the window of the slots phi that starts at s_r, so

    y_r   = factor sign_r sum_j phi[s_r + j] x[j]                     correlation of phi with x
    gx_j  = factor sum_r sign_r g_r phi[s_r + j]                      correlation of phi with z
    dphi_p = factor sum_batch sum_s z[s] x[p - s]                     convolution of z with x

where z holds sign_r g_r at s_r. Overlap-save: the vector is cut into blocks of `length` slots that
begin `hop` slots after each other; the starts inside a hop are served by that block. One transform
of x then serves all blocks, gx needs one inverse transform (the blocks are summed in the frequency
domain), and dphi one for each block (the batch is summed there).
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.products.costs import TRANSFORMED_NUMEL, BlockTransform
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.prepared import Prepared
from memfold.strategies.sharing.products.straddling import StraddlingRows

__all__ = ["Correlation"]


class Correlation:
    """The products of one layout; see `memfold.strategies.sharing.products`."""

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        self.transform = BlockTransform.of(layout.columns, layout.num_slots)
        self._straddling = StraddlingRows(layout)
        length, hop = self.transform.length, self.transform.hop
        block, place = np.divmod(layout.row_starts, hop)
        # The spectra are conjugate, so outputs come in reverse order.
        self._reads = torch.from_numpy(block * length + -place % length)
        self._signs = torch.from_numpy(layout.row_signs)
        self._places = block * length + place

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors."""
        scatter = self.__dict__.get("_scatter")
        own = self._reads.nbytes + self._signs.nbytes + self._places.nbytes
        return own + (0 if scatter is None else scatter.nbytes)

    @cached_property
    def _scatter(self) -> "_Scatter":
        return _Scatter(self.layout, self._places, self.transform)

    def product(self, prepared: Prepared, x: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * x @ W.T to y, shape (batch, num_rows)."""
        length, num_blocks = self.transform.length, self.transform.count
        spectrum = self._spectrum(prepared)
        signs = self._signs.to(y.device, prepared.slots.dtype) * factor
        reads = self._reads.to(y.device)
        padded = prepared.slots.new_zeros(min(len(x), self._group), length)
        products = spectrum.new_empty(min(len(x), self._step), *spectrum.shape)
        for rows in _ranges(0, len(x), self._group):
            transformed = self._transform_rows(x[rows], padded)
            for part in _ranges(rows.start, rows.stop, self._step):
                of_x = transformed[part.start - rows.start : part.stop - rows.start, None]
                found = torch.mul(of_x, spectrum, out=products[: part.stop - part.start])
                blocks = torch.fft.irfft(found, n=length).view(-1, num_blocks * length)
                places = reads.expand(part.stop - part.start, -1)
                torch.mul(torch.gather(blocks, 1, places), signs, out=y[part])
        self._straddling.product(prepared, x, factor, y)

    def transposed_product(self, prepared: Prepared, g: Tensor, factor: float, y: Tensor) -> None:
        """Write factor * g @ W to y, shape (batch, columns), dtype of the slots."""
        self._backward(prepared, g, None, factor, None, y)
        self._straddling.transposed_product(prepared, g, factor, y)

    def add_gradient(
        self, prepared: Prepared, g: Tensor, x: Tensor, factor: float, out: Tensor
    ) -> None:
        """Add the gradient to the doubled vector `out`, shape (2m,)."""
        self._backward(prepared, g, x, factor, out, None)
        self._straddling.add_gradient(g, x, factor, out)

    def backward(
        self, prepared: Prepared, g: Tensor, x: Tensor, factor: float, out: Tensor, y: Tensor
    ) -> None:
        """Do both at once, which saves a transform of g."""
        self._backward(prepared, g, x, factor, out, y)
        self._straddling.transposed_product(prepared, g, factor, y)
        self._straddling.add_gradient(g, x, factor, out)

    @property
    def _step(self) -> int:
        return self.transform.samples

    @property
    def _group(self) -> int:
        """Samples whose transforms are kept at a time: a whole number of steps."""
        wanted = max(1, TRANSFORMED_NUMEL // self.transform.length)
        return -(-wanted // self._step) * self._step

    def _spectrum(self, prepared: Prepared) -> Tensor:
        return prepared.spectrum(self.transform.length, self.transform.hop, self.transform.count)

    def _transform_rows(self, x: Tensor, padded: Tensor) -> Tensor:
        rows = padded[: len(x)]
        rows[:, : self.layout.columns] = x
        return torch.fft.rfft(rows)

    def _backward(
        self,
        prepared: Prepared,
        g: Tensor,
        x: Tensor | None,
        factor: float,
        out: Tensor | None,
        y: Tensor | None,
    ) -> None:
        length, num_blocks = self.transform.length, self.transform.count
        spectrum = self._spectrum(prepared)
        new_zeros = prepared.slots.new_zeros
        scattered = new_zeros(min(len(g), self._step), num_blocks * length)
        padded = new_zeros(min(len(g), self._group), length)
        sums = spectrum.new_empty(len(padded), spectrum.shape[1])
        total = torch.zeros_like(spectrum)
        products = spectrum.new_empty(len(scattered), *spectrum.shape)
        for rows in _ranges(0, len(g), self._group):
            of_x = None if x is None else self._transform_rows(x[rows], padded)
            for part in _ranges(rows.start, rows.stop, self._step):
                size, local = part.stop - part.start, part.start - rows.start
                placed = self._scatter(g[part], scattered[:size])
                of_g = torch.fft.rfft(placed.view(size, num_blocks, length))
                if y is not None:
                    found = torch.mul(of_g, spectrum, out=products[:size])
                    torch.sum(found, 1, out=sums[local : local + size])
                if of_x is not None:
                    total += of_g.mul_(of_x[local : local + size, None]).sum(0)
            if y is not None:
                self._write_reversed(sums[: rows.stop - rows.start], factor, y[rows])
        if out is not None:
            self._add_blocks(torch.fft.irfft(total, n=length), factor, out)

    def _write_reversed(self, sums: Tensor, factor: float, y: Tensor) -> None:
        """The spectra are conjugate: entry j of gx comes at place -j."""
        found = torch.fft.irfft(sums, n=self.transform.length)
        torch.mul(found[:, :1], factor, out=y[:, :1])
        if y.shape[1] > 1:
            torch.mul(found[:, 1 - y.shape[1] :].flip(1), factor, out=y[:, 1:])

    def _add_blocks(self, blocks: Tensor, factor: float, out: Tensor) -> None:
        """Overlap-add; what lies beyond the last start's window is 0 up to rounding."""
        for block, begin in enumerate(range(0, self.layout.num_slots, self.transform.hop)):
            end = min(self.layout.num_slots, begin + self.transform.hop) + self.layout.columns - 1
            out[begin:end].add_(blocks[block, : end - begin], alpha=factor)


def _ranges(begin: int, end: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, end)) for a in range(begin, end, step)]


class _Scatter:
    """Puts gradients at their rows' starts.

    Rows with the same start follow one level after the other, so that no two threads ever add to
    one place: results do not depend on how threads are scheduled.
    """

    def __init__(self, layout: RowLayout, places: np.ndarray, transform: BlockTransform) -> None:
        """Sort the rows into levels.

        Args:
            layout: With at least one whole row.
            places: Of each row among the blocks: int64, shape (num_rows,).
            transform: Of the blocks.
        """
        starts, signs = layout.row_starts, layout.row_signs
        levels = []
        last_row, rest = np.empty(layout.num_slots, dtype=np.int64), np.flatnonzero(signs)
        while len(rest):
            # The last of several assignments to one element stays.
            last_row[starts[rest]] = rest
            is_last = last_row[starts[rest]] == rest
            rows, rest = rest[is_last], rest[~is_last]
            levels.append(tuple(torch.from_numpy(a) for a in (rows, places[rows], signs[rows])))
        # No row starts at the end of a block: what is not written there writes its zero here.
        self._writes = torch.full((layout.num_rows,), transform.length - 1)
        self._signs = torch.zeros(layout.num_rows, dtype=torch.int64)
        (rows, first_places, first_signs), *self._repeats = levels
        self._writes[rows], self._signs[rows] = first_places, first_signs

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors."""
        repeats = [tensor for level in self._repeats for tensor in level]
        return sum(tensor.nbytes for tensor in (self._writes, self._signs, *repeats))

    def __call__(self, g: Tensor, out: Tensor) -> Tensor:
        """Put signed gradients into `out`, in which all other places are 0.

        Args:
            g: Shape (batch, num_rows).
            out: Shape (batch, count * length).

        Returns:
            `out`.
        """
        size, device, dtype = len(g), out.device, out.dtype
        signed = g * self._signs.to(device, dtype)
        out.scatter_(1, self._writes.to(device).expand(size, -1), signed)
        for rows, places, signs in self._repeats:
            signed = g.index_select(1, rows.to(device)) * signs.to(device, dtype)
            out.scatter_add_(1, places.to(device).expand(size, -1), signed)
        return out
