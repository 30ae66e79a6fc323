"""All weights of a small model at once: one pass builds them, one folds their gradients.

Where layers are small, the Python of building each by itself takes longer than the numbers. Here
all weights exist while a step lasts, n numbers, and what depends on the mapping alone is computed
once for all steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memfold.strategies.sharing.running_passes import RunningPass

if TYPE_CHECKING:
    from memfold.strategies.sharing.mapping import SlotMapping

__all__ = ["TensorByTensor", "WholeModel", "WholePass"]

# See `WholeModel`.
_FREED_BYTES = 1 << 24
# Hashes are kept from step to step if they take at most so small a part of the weights' bytes.
_SMALL = 64


class WholeModel(ABC):
    """How all weights are read from slots of shape (m,), and how their gradients are added."""

    def __init__(
        self,
        mapping: "SlotMapping",
        factors: Sequence[float],
        zero_rows: Sequence[int | None],
        slot_factors: tuple[Tensor, Tensor],
    ) -> None:
        """See `SlotMapping.whole`."""
        self.mapping = mapping
        self.tensors = tuple(zip(mapping.spans, factors, zero_rows, strict=True))
        self.slot_factors = slot_factors
        self.device, self.dtype = slot_factors[0].device, slot_factors[0].dtype
        # Once so much was freed, glibc keeps what a step frees for the next one: pages fresh from
        # the system take longer than the numbers in them.
        torch.empty(_FREED_BYTES, dtype=torch.uint8, device="cpu")

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what is kept from step to step, beside what the mapping keeps."""

    @abstractmethod
    def tables(self) -> Any:
        """Make what `read` and `fold` need; the graph of a step holds it."""

    @abstractmethod
    def scale(self, slots: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """See `SlotMapping.scale`."""

    @abstractmethod
    def read(self, slots: Tensor, tables: Any) -> Sequence[Tensor]:
        """Build all weights, in their shapes and the dtype of the slots; they may share memory."""

    @abstractmethod
    def fold(self, gradients: Sequence[Tensor | None], tables: Any) -> Tensor:
        """Sum gradients in their slots: the adjoint of `read`.

        The order of the additions is fixed.

        Args:
            gradients: Of each weight, dense or sparse, of any floating dtype; left as they are.
            tables: Of this step.

        Returns:
            Shape (m,), a new tensor.
        """


class TensorByTensor(WholeModel):
    """One tensor after the other, by the mapping's own ways."""

    _kept: Any = None

    @property
    def nbytes(self) -> int:
        """See `WholeModel.nbytes`."""
        return 0 if self._kept is None else self._kept.nbytes

    def tables(self) -> object:
        """See `WholeModel.tables`: hashes, which the mapping finds again while they are held.

        They are kept where they are small beside the weights.
        """
        hashes = self.mapping.hashes()
        if hashes.nbytes * _SMALL <= self.mapping.num_weights * self.dtype.itemsize:
            self._kept = hashes
        return hashes

    def scale(self, slots: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """See `WholeModel.scale`."""
        return self.mapping.scale(slots, factors, out)

    def read(self, slots: Tensor, tables: object) -> list[Tensor]:
        """See `WholeModel.read`."""
        weights = []
        for span, factor, row in self.tensors:
            weight = self.mapping.gather(slots, span, factor).view(span.shape)
            if row is not None:
                weight[row].zero_()
            weights.append(weight)
        return weights

    def fold(self, gradients: Sequence[Tensor | None], tables: object) -> Tensor:
        """See `WholeModel.fold`."""
        out = torch.zeros(self.mapping.num_slots, dtype=self.dtype, device=self.device)
        for gradient, (span, factor, row) in zip(gradients, self.tensors, strict=True):
            if gradient is not None:
                self.mapping.add_weight(gradient, span, factor, out, row)
        return out


class WholePass(RunningPass):
    """The weights of one forward pass, all of them built when it begins."""

    def __init__(self, values: Tensor, whole: WholeModel) -> None:
        """Build the weights from phi, of shape (m,)."""
        super().__init__(values)
        options = whole, whole.tables(), *whole.slot_factors, values.dtype
        self._weights = _BuildWeights.apply(values, *options)

    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """See `RunningPass.weight`."""
        weight = self._weights[index]
        if not (self.tracked and torch.is_grad_enabled()):
            weight = weight.detach()
        return weight if weight.dtype == dtype else weight.to(dtype)


# Both are written the older way, with the context in `forward`: torch.func does not meet them.


class _BuildWeights(torch.autograd.Function):
    """All weights from phi, times one factor; its gradient is multiplied by the other."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        whole: WholeModel,
        tables: Any,
        forward_factor: Tensor,
        backward_factor: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        """Build the weights in `dtype`."""
        ctx.options = whole, tables, backward_factor, dtype
        ctx.values_dtype = values.dtype
        ctx.set_materialize_grads(False)
        slots = whole.scale(values.to(whole.dtype), forward_factor)
        weights = whole.read(slots, tables)
        return tuple(weights if dtype == whole.dtype else (weight.to(dtype) for weight in weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return Gamma times the chain rule, of shape (m,)."""
        whole, tables, factor, _ = ctx.options
        if torch.is_grad_enabled():
            gradient = _FoldGradients.apply(*ctx.options, *grads)
        else:
            slots = whole.fold(grads, tables)
            gradient = whole.scale(slots, factor, out=slots)
        return gradient.to(ctx.values_dtype), None, None, None, None, None


class _FoldGradients(torch.autograd.Function):
    """What `_BuildWeights.backward` computes, where a graph of it is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        whole: WholeModel,
        tables: Any,
        factor: Tensor,
        dtype: torch.dtype,
        *grads: Tensor | None,
    ) -> Tensor:
        """Fold gradients of all weights, of `dtype`, into shape (m,)."""
        ctx.options = whole, tables, factor, factor, dtype
        return whole.scale(whole.fold(grads, tables), factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the gradients."""
        return None, None, None, None, *_BuildWeights.apply(grads[0], *ctx.options)
