"""What phi and the scales are at the start, from the dense weights that they replace.

Least squares: with theta_i = s_i phi_b and s_i = g_i lambda / nu_b, each slot is a problem of its
own, and the sum over all weights of (w_i - s_i phi_b)^2 is least where

    phi_b = sum_i s_i w_i / sum_i s_i^2 = nu_b sum_i g_i lambda w_i / (load_b mu_b^2).

At ratio 1 these are the dense weights themselves. Rows that stay zero take no part in the sum over
w, and count as weights of zero.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from memfold.compression.initial_scale import initial_scale_of
from memfold.compression.selection import CompressibleWeight, padding_row_of
from memfold.seeding import derive_seed
from memfold.strategies.sharing.forward_pass import working_dtype
from memfold.strategies.sharing.gradient_scale import slot_factors
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["InitialValues", "InitialWeights"]

InitialValues = Literal["random", "least_squares"]


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
            values: What phi is to be; where nothing is shared, it is the dense weights. Of several
                that lie in one place, the first is meant, or with `least_squares` their mean.
        """
        self._weights = weights
        self._mapping = mapping
        self._device = device
        self._dtype = weights[0].tensor.dtype
        self.scales = [0.0] * len(weights)
        """The lambdas, once all weights have passed."""
        dtype = working_dtype(self._dtype)
        self._firsts = {weight.name: index for index, weight in enumerate(weights)}
        self._copies = mapping.is_bijection and (values == "random" or not mapping.has_copies)
        self._folds = self._copies or values == "least_squares"
        size = mapping.num_slots if self._folds else 0
        self._folded = torch.zeros(size, dtype=dtype, device=device)

    def take(self, index: int) -> None:
        """Measure weight number `index`, which has its values now; keep sums of them at most.

        Raises:
            InputError: A weight is not finite.
        """
        weight, mapping = self._weights[index], self._mapping
        span = mapping.spans[index]
        first = self._firsts[span.name]
        scale = initial_scale_of(weight) if index == first else self.scales[first]
        self.scales[index] = scale
        dense = weight.tensor.detach()
        if self._copies:  # exactly: no sum of squares
            if index == first:
                mapping.scatter(dense.reshape(-1), span, 1 / scale, self._folded)
        elif self._folds:
            mapping.add_weight(dense, span, scale, self._folded, padding_row_of(weight))

    def values(self, shared: SharedVector, seed: int) -> Tensor:
        """Draw phi: N(0, nu_b^2), or solve for what gives the dense weights, or the nearest.

        Returns:
            Shape (m,), in the dtype of the weights.
        """
        forward, _ = shared.slot_factors(self._device, self._folded.dtype)
        nu = torch.where(forward > 0, 1 / forward, 0)
        if self._copies:
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
