"""What phi and the scales are at the start, from the dense weights that they replace."""

from collections.abc import Sequence
from math import isfinite, prod

import numpy as np
import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.selection import CompressibleWeight
from memfold.strategies.sharing.autograd import working_dtype
from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["initial_scale_of", "initial_values"]


def initial_scale_of(weight: CompressibleWeight) -> float:
    """Measure lambda: the standard deviation of a tensor's initial weights, as a float32 number.

    A constant tensor (zero-initialised heads, one-element weights) has none. Its absolute value
    stands in for it; for zeros, the standard deviation 1 / sqrt(3 fan_in) that PyTorch's own
    default initialisation would have had.

    Raises:
        InputError: A weight is not finite.
    """
    tensor = weight.tensor.detach()
    spread = float(tensor.double().std()) if weight.numel > 1 else 0.0
    if spread == 0:
        spread = float(tensor.double().flatten()[0].abs())
    if not isfinite(spread):
        raise InputError(f"{weight.name} has initial weights that are not finite")
    if spread == 0:
        spread = (3 * prod(weight.shape[1:])) ** -0.5
    return max(float(np.float32(spread)), float(np.finfo(np.float32).tiny))


def initial_values(
    shared: SharedVector, weights: Sequence[CompressibleWeight], seed: int
) -> Tensor:
    """Draw phi: N(0, nu_b^2), or what gives the dense weights where every slot holds one."""
    like = weights[0].tensor
    forward, _ = shared.slot_factors(like.device, working_dtype(like.dtype))
    nu = torch.where(forward > 0, 1 / forward, 0)
    if not shared.mapping.is_bijection:
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "shared-values"))
        noise = torch.randn(
            shared.num_values, generator=generator, dtype=torch.float64, device="cpu"
        )
        return (noise.to(like.device) * nu).to(like.dtype)
    values = torch.zeros_like(nu)
    for weight, span, scale in zip(weights, shared.mapping.spans, shared.scales, strict=True):
        dense = weight.tensor.detach().reshape(-1).to(values.dtype)
        shared.mapping.scatter(dense, span, 1 / scale, values)
    return (values * nu).to(like.dtype)
