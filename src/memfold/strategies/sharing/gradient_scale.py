"""Unit gain for every slot, and the scale of its gradient.

mu_b^2  = mean of lambda^2 over the weights in slot b
nu_b    = mu_b, or one constant when an initial scale is given
Gamma_b = (nu_b / mu_b)^2 / load_b^p      p = 1 (projection), 1/2 (length);  1 for none
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from memfold.strategies.sharing.mapping import SlotMapping

__all__ = ["GradientScale", "slot_factors"]

GradientScale = Literal["length", "projection", "none"]


def slot_factors(
    mapping: SlotMapping,
    scales: Sequence[float],
    initial_scale: float | None,
    gradient_scale: GradientScale,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute 1 / nu_b and Gamma_b / nu_b for each segment of slots.

    Args:
        mapping: Of all weights.
        scales: Lambda of each weight.
        initial_scale: See above.
        gradient_scale: See above.
        dtype: In which the factors will be used.

    Returns:
        Two tensors of shape (segments,), float64, on the CPU; 0 where no weight lies.
    """
    load = mapping.accumulate([1.0] * len(scales))
    mean_square = mapping.accumulate([scale**2 for scale in scales])
    unused = load == 0
    load.clamp_(min=1)
    # A factor beyond the dtype would be infinite: such a slot has less than unit gain.
    mean_square.div_(load).clamp_(min=torch.finfo(dtype).tiny).masked_fill_(unused, 1)
    if initial_scale is None:
        forward = mean_square.rsqrt()
    else:
        forward = torch.full_like(load, 1 / initial_scale)
    forward.masked_fill_(unused, 0)
    if gradient_scale == "none":
        return forward, forward
    if gradient_scale == "length":
        load.sqrt_()
    # Gamma / nu = nu / (mu^2 load^p), where 1 / nu is at hand.
    backward = load.mul_(mean_square).mul_(forward).reciprocal_().masked_fill_(unused, 0)
    return forward, backward
