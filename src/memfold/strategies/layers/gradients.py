"""The gradient of a tensor that B layers use, which is the sum of B gradients, scaled."""

from typing import Any

import torch
from torch import Tensor

from memfold.compression.transforms import is_transformed
from memfold.strategies.sharing.gradient_scale import GradientScale

__all__ = ["factor_of", "scale_gradient"]


def factor_of(scale: GradientScale, uses: int) -> float:
    """Return 1/sqrt(B), 1/B or 1: see `sharing/gradient_scale.py`, where B is a slot's load."""
    return uses ** -{"length": 0.5, "projection": 1.0, "none": 0.0}[scale]


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Return the same numbers, whose gradient is multiplied by `factor` on its way to `tensor`."""
    if torch.compiler.is_compiling():  # it knows no function that has forward derivatives
        held = tensor.detach()
        return held + factor * (tensor - held)
    # What torch.func meets is written in a way that takes a tenth of a millisecond at each call.
    scaled = (_TransformedScale if is_transformed(tensor) else _Scale).apply(tensor, factor)
    assert isinstance(scaled, Tensor)
    return scaled


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _TransformedScale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, factor: float) -> Tensor:
        del factor
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Scale.backward(ctx, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].view_as(tangents[0])
