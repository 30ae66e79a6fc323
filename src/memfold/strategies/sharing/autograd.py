"""The linear maps of parameter sharing, with their gradients.

Classic: values (m,) --ScaleSlots--> slots (m,) --ReadWeight--> one dense weight, and back; autograd
keeps every weight for the backward pass, and sums one gradient of m numbers per weight.

Lean: values --CollectGradient--> a token, a scalar that ties every `ReadLean` to phi. The weights
are read from a `SlotSource` that the graph holds, and their gradients are added into its one
buffer, which `CollectGradient` hands to phi at the end of the backward pass.

Whole: all weights at once, and back, where they are small: `whole_model.py`.

`ReadWeight` and `AddWeight` are each other's adjoint, so gradients of any order are exact. Scaling
is not: its backward pass applies the gradient scale Gamma, here and not in an optimizer or an
attribute of the parameter, where it survives deepcopy, DDP, AMP and checkpointing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memfold.strategies.sharing.mapping import SlotMapping, Span
from memfold.strategies.sharing.slot_source import SlotSource

__all__ = ["AddWeight", "CollectGradient", "ReadLean", "ReadWeight", "ScaleSlots", "reaches"]


class ScaleSlots(torch.autograd.Function):
    """slots = forward_factor * values, whose gradient is scaled by backward_factor instead."""

    @staticmethod
    def forward(
        values: Tensor, forward_factor: Tensor, backward_factor: Tensor, mapping: SlotMapping
    ) -> Tensor:
        """Scale values of shape (m,) by factors of shape (segments,)."""
        return mapping.scale(values.to(forward_factor.dtype), forward_factor)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the factor for the way back, for as many passes as there may be."""
        values, _, ctx.factor, ctx.mapping = inputs  # type: ignore[attr-defined]
        ctx.dtype = values.dtype  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return Gamma times the chain rule."""
        factor, mapping = ctx.factor, ctx.mapping  # type: ignore[attr-defined]
        scaled = ScaleSlots.apply(grads[0], factor, factor, mapping)
        return scaled.to(ctx.dtype), None, None, None  # type: ignore[attr-defined]


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
        weight = mapping.gather(slots, span, factor, dtype).view(span.shape)
        if zero_row is not None:
            weight[zero_row].zero_()
        return weight

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the slots alive: other weights of the same pass are read from them."""
        ctx.slots, *ctx.options = inputs  # type: ignore[attr-defined]

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
        slots = torch.zeros(mapping.num_slots, dtype=slots_dtype, device=weight.device)
        mapping.add_weight(weight, span, factor, slots, zero_row)
        return slots

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the options."""
        _, _, *ctx.options = inputs  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight."""
        weight = ReadWeight.apply(grads[0], *ctx.options)  # type: ignore[attr-defined]
        return weight, None, None, None, None, None, None


# The two below are written the older way, with the context in `forward`: torch.func does not meet
# them, and PyTorch inspects the signature of the other kind at every call.


def reaches(token: Tensor | None) -> bool:
    """Whether the current backward pass goes on to phi; one for certain inputs may not."""
    if token is None or token.grad_fn is None:
        return False
    return torch._C._will_engine_execute_node(token.grad_fn)


class CollectGradient(torch.autograd.Function):
    """A zero that depends on phi; its backward pass returns what the source has collected."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: SlotSource) -> Tensor:
        """Return a scalar.

        Args:
            ctx: Of this call.
            values: Phi, shape (m,).
            source: What the weights of this pass are read from.
        """
        ctx.source, ctx.dtype = source, values.dtype
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        """Return Gamma times the collected gradient, shape (m,)."""
        factor, mapping = ctx.source.backward_factor, ctx.source.mapping
        hashes = mapping.hashes()  # the source lets go of them
        collected = ctx.source.take_gradient()
        if collected is None:
            return None, None
        if not torch.is_grad_enabled():
            gradient = mapping.scale(collected, factor, out=collected).to(ctx.dtype)
            del hashes
            return gradient, None
        return ScaleSlots.apply(collected, factor, factor, mapping).to(ctx.dtype), None


class ReadLean(torch.autograd.Function):
    """Build one weight; add its gradient to the source's buffer."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, source: SlotSource, index: int, dtype: torch.dtype
    ) -> Tensor:
        """Build weight number `index` in `dtype`.

        Args:
            ctx: Of this call.
            token: Of `CollectGradient`.
            source: What to read from.
            index: Of the weight.
            dtype: Of the result.
        """
        ctx.source, ctx.index, ctx.weight_dtype = source, index, dtype
        return source.read(index, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        """Add to the buffer; the token's own gradient is nothing."""
        source, gradient = ctx.source, grads[0]
        if torch.is_grad_enabled():
            options = source.options(ctx.index, ctx.weight_dtype)
            source.collect(AddWeight.apply(gradient, source.dtype, source.mapping, *options))
        else:
            source.add(ctx.index, gradient)
        return None, None, None, None
