"""The two linear maps of parameter sharing, with their gradients.

values (m,) --ScaleSlots--> slots (m,) --ReadWeight--> one dense weight, and back. `ReadWeight` and
`AddWeight` are each other's adjoint, so gradients of any order are exact. Scaling is not: its
backward pass applies the gradient scale Gamma, here and not in an optimizer or an attribute of
the parameter, where it survives deepcopy, DDP, AMP and checkpointing.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memfold.strategies.sharing.mapping import SlotMapping, Span

__all__ = ["ReadWeight", "ScaleSlots", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which slots are scaled and summed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class ScaleSlots(torch.autograd.Function):
    """slots = forward_factor * values, whose gradient is scaled by backward_factor instead."""

    @staticmethod
    def forward(values: Tensor, forward_factor: Tensor, backward_factor: Tensor) -> Tensor:
        """Scale elementwise; all of shape (m,)."""
        return values.to(forward_factor.dtype) * forward_factor

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the factor for the way back, for as many passes as there may be."""
        values, _, backward_factor = inputs
        ctx.factor, ctx.dtype = backward_factor, values.dtype  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return Gamma times the chain rule."""
        scaled = grads[0] * ctx.factor  # type: ignore[attr-defined]
        return scaled.to(ctx.dtype), None, None  # type: ignore[attr-defined]


class ReadWeight(torch.autograd.Function):
    """weight = factor * g * slots[h], in the shape and dtype asked for."""

    @staticmethod
    def forward(
        slots: Tensor,
        mapping: SlotMapping,
        span: Span,
        factor: float,
        dtype: torch.dtype,
        zero_row: int | None,
    ) -> Tensor:
        """Build one weight from slots of shape (m,)."""
        weight = mapping.gather(slots, span, factor).view(span.shape).to(dtype)
        if zero_row is not None:
            weight[zero_row].zero_()
        return weight

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Keep the slots alive: other weights of the same pass are read from them."""
        slots, *ctx.options = inputs  # type: ignore[attr-defined]
        ctx.slots = slots  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the slots."""
        options = ctx.options  # type: ignore[attr-defined]
        return AddWeight.apply(grads[0], ctx.slots.dtype, *options), None, None, None, None, None  # type: ignore[attr-defined]


class AddWeight(torch.autograd.Function):
    """The adjoint of `ReadWeight`: slots[h] += factor * g * weight, from zero."""

    @staticmethod
    def forward(
        weight: Tensor,
        slots_dtype: torch.dtype,
        mapping: SlotMapping,
        span: Span,
        factor: float,
        dtype: torch.dtype,
        zero_row: int | None,
    ) -> Tensor:
        """Sum the weight's elements into slots of shape (m,)."""
        if weight.is_sparse:
            weight = weight.to_dense()
        weight = weight.to(slots_dtype)
        if zero_row is not None:
            weight = weight.clone()
            weight[zero_row].zero_()
        slots = weight.new_zeros(mapping.num_slots)
        mapping.scatter(weight.reshape(-1), span, factor, slots)
        return slots

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Keep the options."""
        _, _, *ctx.options = inputs  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight."""
        weight = ReadWeight.apply(grads[0], *ctx.options)  # type: ignore[attr-defined]
        return weight, None, None, None, None, None, None
