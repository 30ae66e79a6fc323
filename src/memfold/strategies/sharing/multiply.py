"""Products with a shared weight that is never built, in the graph of a lean pass."""

from typing import Any

import torch
from torch import Tensor

from memfold.strategies.sharing.autograd import AddWeight, ReadLean, reaches
from memfold.strategies.sharing.products import Method
from memfold.strategies.sharing.slot_source import SlotSource

__all__ = ["MultiplyLean"]


class MultiplyLean(torch.autograd.Function):
    """inputs @ weight.T by the windows of phi or by Fourier transforms, and back."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        token: Tensor | None,
        source: SlotSource,
        index: int,
        method: Method,
    ) -> Tensor:
        """Multiply.

        Args:
            ctx: Of this call.
            inputs: Shape (batch, columns).
            token: Of `CollectGradient`; none where phi needs no gradient.
            source: What the weight would be read from.
            index: Of the weight.
            method: How.

        Returns:
            Shape (batch, rows), in the dtype of `inputs`.
        """
        ctx.options = source, index, method
        ctx.save_for_backward(inputs, token)
        products = source.products(index)
        assert products is not None
        return products.product(source.prepared, inputs, source.scales[index], method)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the inputs; add that of the weight to the source's buffer."""
        inputs, token = ctx.saved_tensors
        source, index, method = ctx.options
        needs_inputs, needs_phi = ctx.needs_input_grad[0], reaches(token)
        if torch.is_grad_enabled():
            of_inputs = _differentiable(inputs, token, grads[0], source, index)
            return of_inputs, None, None, None, None
        products, prepared, factor = source.products(index), source.prepared, source.scales[index]
        # Matrix products want rows that are contiguous.
        given = prepared, grads[0].contiguous()
        if not needs_phi:
            of_inputs = products.transposed_product(*given, factor, method)
            return of_inputs, None, None, None, None
        doubled = products.needs_doubled(method)
        buffer = source.doubled_buffer() if doubled else source.buffer()
        if needs_inputs:
            of_inputs = products.backward(*given, inputs, factor, buffer, method)
            return of_inputs, None, None, None, None
        products.add_gradient(*given, inputs, factor, buffer, method)
        return None, None, None, None, None


def _differentiable(
    inputs: Tensor, token: Tensor | None, gradient: Tensor, source: SlotSource, index: int
) -> Tensor:
    """Build the weight after all: derivatives of the gradient go through it."""
    span = source.mapping.spans[index]
    matrix = span.shape[0], span.numel // span.shape[0]
    if token is None:
        weight = source.read(index, inputs.dtype)
    else:
        weight = ReadLean.apply(token, source, index, inputs.dtype)
        options = source.options(index, inputs.dtype)
        of_weight = (gradient.T @ inputs).view(span.shape)
        mapping = source.mapping
        source.collect(AddWeight.apply(of_weight, source.dtype, mapping, *options))
    return gradient @ weight.view(matrix)
