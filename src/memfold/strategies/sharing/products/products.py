"""The three products with a shared matrix, by either method."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.strategies.sharing.products.correlation import Correlation
from memfold.strategies.sharing.products.costs import takes_views
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.prepared import Prepared
from memfold.strategies.sharing.products.windows import WindowProducts
from memfold.strategies.sharing.signs import OuterSigns

__all__ = ["METHODS", "Method", "RowProducts"]

Method = Literal["windows", "correlation"]
METHODS: tuple[Method, ...] = ("windows", "correlation")


class RowProducts:
    """Products with W[r, c] = factor * sign * slots[window of row r], which is never built.

    The sign is that of the window, times those of row and column if there are any: these multiply
    the vectors on either side of W, r and c of a diagonal matrix each.

    W has shape (num_rows, columns). For a layer that stores its weight as (in, out), the product
    takes the output's gradient, and `transposed_product` the input. Inputs may be of a lower
    precision than the slots: "windows" multiplies in it, "correlation" in that of the slots.
    Methods take no part in autograd.
    """

    def __init__(self, layout: RowLayout, signs: OuterSigns | None = None) -> None:
        """Take what describes W.

        Args:
            layout: Where its rows lie, and the signs of their windows.
            signs: Of rows and columns, on the device of the slots.
        """
        self.layout = layout
        self._signs = signs

    def needs_doubled(self, method: Method) -> bool:
        """Whether gradients need the doubled buffer; else one of shape (m,) does, too."""
        return method != "windows" or not takes_views(self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of the index arrays."""
        known = self.__dict__.get("_correlation")
        return self.layout.nbytes + (0 if known is None else known.nbytes)

    def product(self, prepared: Prepared, x: Tensor, factor: float, method: Method) -> Tensor:
        """Compute x @ W.T.

        Args:
            prepared: Of the slots.
            x: Shape (batch, columns), contiguous rows.
            factor: Of all weights.
            method: How.

        Returns:
            Shape (batch, num_rows), dtype of x.

        Raises:
            InputError: `method` is not known, or a shape does not fit.
        """
        self._check(prepared, method, x=x)
        y = x.new_empty(len(x), self.layout.num_rows)
        if y.numel():
            self._by(method).product(prepared, self._sign_columns(x), factor, y)
        return self._sign_rows(y, out=y)

    def transposed_product(
        self, prepared: Prepared, g: Tensor, factor: float, method: Method
    ) -> Tensor:
        """Compute g @ W.

        Args:
            prepared: Of the slots.
            g: Shape (batch, num_rows).
            factor: Of all weights.
            method: How.

        Returns:
            Shape (batch, columns), dtype of g.

        Raises:
            InputError: See `product`.
        """
        self._check(prepared, method, g=g)
        y = prepared.slots.new_empty(len(g), self.layout.columns)
        if g.numel():
            self._by(method).transposed_product(prepared, self._sign_rows(g), factor, y)
        return self._sign_columns(y, out=y).to(g.dtype)

    def add_gradient(
        self,
        prepared: Prepared,
        g: Tensor,
        x: Tensor,
        factor: float,
        out: Tensor,
        method: Method,
    ) -> None:
        """Add to `out` what g.T @ x, the gradient of W, gives to each slot.

        Args:
            prepared: Of the slots.
            g: Gradient of the product, shape (batch, num_rows).
            x: What the product was taken with, shape (batch, columns), dtype of g.
            factor: Of all weights.
            out: Gradient of the doubled vector, shape (2m,), dtype of the slots, changed in place.
                All layers of a step may share it; the gradient of the slots is out[:m] + out[m:].
                Where `needs_doubled(method)` is false, the gradient of the slots, shape (m,), does.
            method: How.

        Raises:
            InputError: See `product`.
        """
        self._check(prepared, method, g=g, x=x, out=out)
        if g.numel():
            g, x = self._sign_rows(g), self._sign_columns(x)
            self._by(method).add_gradient(prepared, g, x, factor, out)

    def backward(
        self,
        prepared: Prepared,
        g: Tensor,
        x: Tensor,
        factor: float,
        out: Tensor,
        method: Method,
    ) -> Tensor:
        """Do what `add_gradient` does and return what `transposed_product` does, in less time.

        Args:
            prepared: Of the slots.
            g: Gradient of the product, shape (batch, num_rows).
            x: What the product was taken with, shape (batch, columns), dtype of g.
            factor: Of all weights.
            out: See `add_gradient`.
            method: How.

        Raises:
            InputError: See `product`.
        """
        self._check(prepared, method, g=g, x=x, out=out)
        y = prepared.slots.new_empty(x.shape)
        if g.numel():
            g, signed = self._sign_rows(g), self._sign_columns(x)
            self._by(method).backward(prepared, g, signed, factor, out, y)
        return self._sign_columns(y, out=y).to(x.dtype)

    def _sign_rows(self, g: Tensor, out: Tensor | None = None) -> Tensor:
        return g if self._signs is None else torch.mul(g, self._signs.rows.to(g), out=out)

    def _sign_columns(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x if self._signs is None else torch.mul(x, self._signs.columns.to(x), out=out)

    @cached_property
    def _windows(self) -> WindowProducts:
        return WindowProducts(self.layout)

    @cached_property
    def _correlation(self) -> Correlation:
        return Correlation(self.layout)

    def _by(self, method: Method) -> WindowProducts | Correlation:
        # Without a whole row there is nothing to correlate.
        if method == "windows" or not len(self.layout.whole):
            return self._windows
        return self._correlation

    def _check(self, prepared: Prepared, method: Method, **tensors: Tensor) -> None:
        layout = self.layout
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if prepared.slots.shape != (layout.num_slots,):
            raise InputError(
                f"slots must have shape ({layout.num_slots},), got {tuple(prepared.slots.shape)}"
            )
        m = layout.num_slots
        batch = len(next(iter(tensors.values())))
        takes_plain = "out" in tensors and not self.needs_doubled(method)
        is_plain = takes_plain and tensors["out"].shape == (m,)
        shapes = {
            "x": (batch, layout.columns),
            "g": (batch, layout.num_rows),
            "out": (m if is_plain else 2 * m,),
        }
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name]:
                raise InputError(
                    f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}"
                )
