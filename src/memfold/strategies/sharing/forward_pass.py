"""What one forward pass of the root has built."""

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from memfold.strategies.sharing.autograd import CollectGradient, ReadLean, ReadWeight, ScaleSlots
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.multiply import MultiplyLean
from memfold.strategies.sharing.products import Method, RowProducts, Way, choose
from memfold.strategies.sharing.running_passes import RunningPass
from memfold.strategies.sharing.saved_weights import SavedWeights
from memfold.strategies.sharing.slot_source import SlotSource

__all__ = ["ForwardPass", "working_dtype"]

_Key = tuple[int, torch.dtype, bool]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which slots are scaled and summed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class ForwardPass(RunningPass):
    """The slots of one forward pass, and the weights that are built from them.

    A weight is built when it is read, and dropped when nothing holds it any more. One that is read
    twice (recurrent and tied modules) stays until the pass ends.
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
        lean: bool,
        lasts: bool = False,
    ) -> None:
        """Scale phi.

        Args:
            values: Phi, shape (m,).
            mapping: Of all weights.
            scales: Lambda of each weight.
            zero_rows: Row of each weight that stays zero, if there is one.
            factors: 1 / nu and Gamma / nu, each of shape (segments,).
            plans: Products that are kept from pass to pass, by weight.
            lean: Build weights again for the backward pass instead of saving them. Not under the
                transforms of torch.func.
            lasts: Serve many batches, and so keep every weight until the pass goes.
        """
        super().__init__(values)
        self.inference = torch.is_inference_mode_enabled()
        self.lasts = lasts
        self._built: dict[_Key, ref[Tensor]] = {}
        self._held: list[Tensor] = []
        self._classic: Tensor | None = None
        self._hooks: SavedWeights | None = None
        self.source = SlotSource(values, mapping, scales, zero_rows, factors, plans, lasts=lasts)
        if not lean:
            self._classic = ScaleSlots.apply(values, *factors, mapping)
        self.token: Tensor | None = None
        if lean and self.tracked:
            self.token = CollectGradient.apply(values, self.source)
        if lean and torch.is_grad_enabled():
            self._hooks = SavedWeights(self.source)

    def enter(self) -> None:
        """Begin to keep weights out of what autograd saves."""
        if self._hooks is not None:
            self._hooks.enter()

    def leave(self) -> None:
        """End it."""
        if self._hooks is not None:
            self._hooks.leave()

    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """See `RunningPass.weight`; a new one where nothing holds it any more."""
        tracked = self.tracked and torch.is_grad_enabled()
        key = index, dtype, tracked
        known = self._built.get(key)
        weight = known() if known is not None else None
        if weight is not None:
            return weight
        weight = self._build(index, dtype, tracked)
        if self.lasts or known is not None:
            self._held.append(weight)
            self.source.mark_repeated(index, dtype)
        self._built[key] = ref(weight)
        return weight

    def choose(self, index: int, batch: int, *, training: bool) -> Way:
        """Choose how to multiply with weight number `index`."""
        products = self.source.products(index)
        if products is None:
            return "weight"
        device, lasts = self.values.device.type, self.lasts
        return choose(products.layout, batch, training=training, device_type=device, lasts=lasts)

    def product(self, index: int, inputs: Tensor, method: Method) -> Tensor | None:
        """Multiply with weight number `index` without building it.

        Args:
            index: Of the weight.
            inputs: Shape (..., columns).
            method: How.

        Returns:
            Shape (..., rows); `None` where there is no such way.
        """
        products, columns = self.source.products(index), inputs.shape[-1]
        kind, dtype = inputs.device.type, self.values.dtype
        autocasts = torch.is_autocast_enabled(kind)
        if products is None or columns != products.layout.columns:
            return None
        if dtype != working_dtype(dtype) or not (autocasts or inputs.dtype == dtype):
            return None
        if method == "correlation":
            # Its plan takes longer than a small batch.
            self.source.keep_plan(index)
        if autocasts and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            flat = inputs.reshape(-1, columns).to(dtype)
            shape = (*inputs.shape[:-1], products.layout.num_rows)
            if self.needs_graph(inputs):
                return MultiplyLean.apply(flat, self.token, self.source, index, method).view(shape)
            factor = self.source.scales[index]
            # Not a view, which could not be changed in place once gradients are on again.
            return products.product(self.source.prepared, flat, factor, method).resize_(shape)

    def needs_graph(self, inputs: Tensor) -> bool:
        """Whether autograd has to see a product with these inputs."""
        return torch.is_grad_enabled() and (self.tracked or inputs.requires_grad)

    def _build(self, index: int, dtype: torch.dtype, tracked: bool) -> Tensor:
        if self._classic is not None:
            options = self.source.options(index, dtype)
            return ReadWeight.apply(self._classic, self.source.mapping, *options)
        if tracked:
            weight = ReadLean.apply(self.token, self.source, index, dtype)
        else:
            with torch.no_grad():
                weight = self.source.read(index, dtype)
        if self._hooks is not None:
            self._hooks.remember(weight, index)
        return weight
