"""What phi and the scales are at the start, from the dense weights that they replace.

Least squares: with theta_i = s_i phi_b and s_i = g_i lambda / nu_b, each slot is a problem of its
own, and the sum over all weights of (w_i - s_i phi_b)^2 is least where

    phi_b = sum_i s_i w_i / sum_i s_i^2 = nu_b sum_i g_i lambda w_i / (load_b mu_b^2).

At ratio 1 these are the dense weights themselves. Rows that stay zero take no part in the sum over
w, and count as weights of zero.
"""

from collections.abc import Sequence
from math import isfinite, prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memfold.compression.initial_values import in_memory_order
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.sharing.forward_pass import working_dtype
from memfold.strategies.sharing.gradient_scale import slot_factors
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.shared_vector import SharedVector
from memfold.strategies.sharing.sources import padding_row_of

__all__ = ["InitialValues", "InitialWeights", "initial_scale_of"]

InitialValues = Literal["random", "least_squares"]

# Weights that are measured at a time: their float64 copies stay in a processor's cache.
_CHUNK_NUMEL = 1 << 17


class InitialWeights:
    """What is kept of dense weights that pass one by one: a scale each, and sums for phi."""

    def __init__(
        self,
        weights: Sequence[CompressibleWeight],
        mapping: SlotMapping,
        device: torch.device,
        values: InitialValues,
    ) -> None:
        """Expect these weights.

        Args:
            weights: In the order of the mapping's spans.
            mapping: Of the weights onto m slots.
            device: Of the values, and of the weights as they pass.
            values: What phi is to be; at ratio 1 it is the dense weights.
        """
        self._weights = weights
        self._mapping = mapping
        self._device = device
        self._dtype = weights[0].tensor.dtype
        self.scales = [0.0] * len(weights)
        """The lambdas, once all weights have passed."""
        dtype = working_dtype(self._dtype)
        self._folds = mapping.is_bijection or values == "least_squares"
        size = mapping.num_slots if self._folds else 0
        self._folded = torch.zeros(size, dtype=dtype, device=device)

    def take(self, index: int) -> None:
        """Measure weight number `index`, which has its values now; keep sums of them at most.

        Raises:
            InputError: A weight is not finite.
        """
        weight = self._weights[index]
        scale = self.scales[index] = initial_scale_of(weight)
        if not self._folds:
            return
        mapping, dense = self._mapping, weight.tensor.detach()
        span = mapping.spans[index]
        if mapping.is_bijection:  # exactly: no sum of squares
            mapping.scatter(dense.reshape(-1), span, 1 / scale, self._folded)
        else:
            mapping.add_weight(dense, span, scale, self._folded, padding_row_of(weight))

    def values(self, shared: SharedVector, seed: int) -> Tensor:
        """Draw phi: N(0, nu_b^2), or solve for what gives the dense weights, or the nearest.

        Returns:
            Shape (m,), in the dtype of the weights.
        """
        forward, _ = shared.slot_factors(self._device, self._folded.dtype)
        nu = torch.where(forward > 0, 1 / forward, 0)
        if self._mapping.is_bijection:
            return self._mapping.scale(self._folded, nu).to(self._dtype)
        if self._folds:
            _, solve = slot_factors(
                self._mapping, self.scales, shared.initial_scale, "projection", self._folded.dtype
            )
            return self._mapping.scale(self._folded, solve.to(self._folded)).to(self._dtype)
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "shared-values"))
        noise = torch.randn(
            shared.num_values, generator=generator, dtype=torch.float64, device="cpu"
        )
        return self._mapping.scale(noise.to(self._device), nu.double()).to(self._dtype)


def initial_scale_of(weight: CompressibleWeight) -> float:
    """Measure lambda: the standard deviation of a tensor's initial weights, as a float32 number.

    A constant tensor (zero-initialised heads, one-element weights) has none. Its absolute value
    stands in for it; for zeros, the standard deviation 1 / sqrt(3 fan_in) that PyTorch's own
    default initialisation would have had.

    Raises:
        InputError: A weight is not finite.
    """
    flat = in_memory_order(weight.tensor.detach())
    spread = _standard_deviation(flat)
    if spread == 0:
        spread = abs(float(flat[0]))
    if not isfinite(spread):
        raise InputError(f"{weight.name} has initial weights that are not finite")
    if spread == 0:
        spread = (3 * prod(weight.shape[1:])) ** -0.5
    return max(float(np.float32(spread)), float(np.finfo(np.float32).tiny))


def _standard_deviation(flat: Tensor) -> float:
    """Return the sample standard deviation of a vector, exactly 0 where it is constant.

    Numerically the two-pass algorithm in float64 for each chunk, and the merge of Chan, Golub and
    LeVeque ("Algorithms for computing the sample variance", 1983) for the whole. The first
    element is subtracted everywhere.
    """
    if flat.numel() < 2:
        return 0.0
    chunks = flat.split(_CHUNK_NUMEL)
    shift = flat[0].double()
    # One buffer for all: between small results, a new one each time fragments the heap.
    buffer = torch.empty(len(chunks[0]), dtype=torch.float64, device=flat.device)
    sizes = torch.tensor([len(chunk) for chunk in chunks]).to(buffer)
    sums, squares = torch.empty_like(sizes), torch.empty_like(sizes)
    for index, chunk in enumerate(chunks):
        centred = buffer[: len(chunk)].copy_(chunk).sub_(shift)
        sums[index] = centred.sum()
        centred.sub_(sums[index] / len(chunk))
        squares[index] = torch.dot(centred, centred)
    between = (sizes * (sums / sizes - sums.sum() / flat.numel()).square()).sum()
    return float(((squares.sum() + between) / (flat.numel() - 1)).sqrt())
