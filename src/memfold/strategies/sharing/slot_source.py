"""What the weights of one forward pass are read from, and where their gradients meet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memfold.strategies.sharing.mapping import SlotMapping, Span
from memfold.strategies.sharing.products import Prepared, RowProducts

__all__ = ["SlotSource", "version_of"]


class SlotSource:
    """phi / nu at the time of one forward pass, and one gradient buffer for its backward passes.

    The graph of the pass holds it and is not held by it: it goes when the graph does. The buffer
    belongs to one call of backward, which PyTorch numbers: a backward pass that was interrupted,
    or one inside another (reentrant checkpoints), leaves nothing behind.
    """

    def __init__(
        self,
        values: Tensor,
        mapping: SlotMapping,
        scales: Sequence[float],
        zero_rows: Sequence[int | None],
        factors: tuple[Tensor, Tensor],
        plans: dict[int, RowProducts],
        *,
        lasts: bool = False,
    ) -> None:
        """Take what does not change during the pass.

        Args:
            values: Phi, shape (m,).
            mapping: Of all weights.
            scales: Lambda of each weight.
            zero_rows: Row of each weight that stays zero, if there is one.
            factors: 1 / nu and Gamma / nu, each of shape (segments,), float32 or float64.
            plans: Products that are kept from pass to pass, by weight; changed in place.
            lasts: See `Prepared`.
        """
        self.mapping = mapping
        self.scales = scales
        self.zero_rows = zero_rows
        self.forward_factor, self.backward_factor = factors
        self._values = values.detach()
        self._version = version_of(self._values)
        self._prepared: Prepared | None = None
        self._lasts = lasts
        self._plans = plans
        self._products: dict[int, RowProducts | None] = {}
        self._hashes: object = mapping.hashes()
        self._gradients: dict[int, Tensor] = {}
        self._doubled: dict[int, Tensor] = {}
        self._repeated: set[tuple[int, torch.dtype]] = set()
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which slots are scaled and summed."""
        return self.forward_factor.dtype

    @property
    def prepared(self) -> Prepared:
        """Phi / nu, shape (m,), and other forms of it that products need.

        Raises:
            RuntimeError: Phi was changed in place between the forward pass and a second backward
                pass: as with any model, the graph's numbers are gone.
        """
        if self._prepared is None:
            if version_of(self._values) != self._version:
                raise RuntimeError(
                    "the shared values were changed in place after the forward pass whose graph "
                    "is used again; run the forward pass again"
                )
            with torch.no_grad():
                values = self._values.to(self.dtype)
                slots = self.mapping.scale(values, self.forward_factor)
                self._prepared = Prepared(slots, lasts=self._lasts)
        return self._prepared

    @property
    def slots(self) -> Tensor:
        """Phi / nu, shape (m,), without a graph."""
        return self.prepared.slots

    def options(
        self, index: int, dtype: torch.dtype
    ) -> tuple[Span, float, torch.dtype, int | None]:
        """Return what `ReadWeight` needs beside slots and mapping."""
        return self.mapping.spans[index], self.scales[index], dtype, self.zero_rows[index]

    def read(self, index: int, dtype: torch.dtype) -> Tensor:
        """Build weight number `index`, a new tensor of `dtype` without a graph."""
        span, factor, dtype, row = self.options(index, dtype)
        weight = self.mapping.gather(self.slots, span, factor, dtype).view(span.shape)
        if row is not None:
            weight[row].zero_()
        return weight

    def mark_repeated(self, index: int, dtype: torch.dtype) -> None:
        """Note that a weight is used more than once in this pass."""
        self._repeated.add((index, dtype))

    def read_again(self, index: int, dtype: torch.dtype) -> Tensor:
        """Build a weight for the backward pass; one with several uses is kept until its end."""
        key = (index, dtype)
        weight = self._kept.get(key)
        if weight is None:
            weight = self.read(index, dtype)
            if key in self._repeated:
                self._kept[key] = weight
        return weight

    def add(self, index: int, gradient: Tensor) -> None:
        """Add the gradient of weight number `index` to the buffer of the current backward pass."""
        buffer = self.buffer()
        span, factor, row = self.mapping.spans[index], self.scales[index], self.zero_rows[index]
        self.mapping.add_weight(gradient, span, factor, buffer, row)

    def buffer(self) -> Tensor:
        """Return the buffer of the current backward pass, shape (m,)."""
        number = _backward_number()
        if number not in self._gradients:
            self._gradients[number] = self._values.new_zeros(len(self._values), dtype=self.dtype)
        return self._gradients[number]

    def products(self, index: int) -> RowProducts | None:
        """Return the products with weight number `index`, if its rows are windows of slots."""
        found = self._plans.get(index) or self._products.get(index)
        # A row that stays zero is no window.
        if found is None and self.zero_rows[index] is None:
            span = self.mapping.spans[index]
            layout = self.mapping.layout(span)
            if layout is not None:
                found = RowProducts(layout, self.mapping.signs(span, self._values.device))
            self._products[index] = found
        return found

    def keep_plan(self, index: int) -> None:
        """Keep the products with weight number `index` for the passes to come."""
        found = self._products.pop(index, None)
        if found is not None:
            self._plans[index] = found

    def doubled_buffer(self) -> Tensor:
        """Return a buffer of shape (2m,), whose halves are both added to the gradient."""
        number = _backward_number()
        if number not in self._doubled:
            size = 2 * len(self._values)
            self._doubled[number] = self._values.new_zeros(size, dtype=self.dtype)
        return self._doubled[number]

    def collect(self, gradient: Tensor) -> None:
        """Add a gradient of shape (m,) that has a graph of its own."""
        number = _backward_number()
        before = self._gradients.get(number)
        self._gradients[number] = gradient if before is None else before + gradient

    def take_gradient(self) -> Tensor | None:
        """Return the buffer of the current backward pass, and forget it.

        What can be computed again goes too: the graph may live on, held by a loss, while the next
        pass runs.
        """
        self._kept.clear()
        self._prepared = self._hashes = None
        self._products.clear()
        number = _backward_number()
        gradient, doubled = self._gradients.pop(number, None), self._doubled.pop(number, None)
        if doubled is None:
            return gradient
        first, second = doubled.chunk(2)
        # A new tensor of m numbers: a view would keep all 2m.
        return first + second if gradient is None else gradient.add_(first).add_(second)


def version_of(values: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for one made in inference mode."""
    return 0 if values.is_inference() else values._version


def _backward_number() -> int:
    return torch._C._current_graph_task_id()
