"""What phi and the scales are at the start, from the dense weights that they replace."""

from collections.abc import Sequence
from math import isfinite, prod

import numpy as np
import torch
from torch import Tensor

from memfold.compression.initial_values import in_memory_order
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.sharing.forward_pass import working_dtype
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["InitialWeights", "initial_scale_of"]

# Weights that are measured at a time: their float64 copies stay in a processor's cache.
_CHUNK_NUMEL = 1 << 17


class InitialWeights:
    """What is kept of dense weights that pass one by one: a scale each, and phi at ratio 1."""

    def __init__(
        self, weights: Sequence[CompressibleWeight], mapping: SlotMapping, device: torch.device
    ) -> None:
        """Expect these weights.

        Args:
            weights: In the order of the mapping's spans.
            mapping: Of the weights onto m slots.
            device: Of the values, and of the weights as they pass.
        """
        self._weights = weights
        self._mapping = mapping
        self._device = device
        self._dtype = weights[0].tensor.dtype
        self.scales = [0.0] * len(weights)
        """The lambdas, once all weights have passed."""
        dtype = working_dtype(self._dtype)
        size = mapping.num_slots if mapping.is_bijection else 0
        self._folded = torch.zeros(size, dtype=dtype, device=device)

    def take(self, index: int) -> None:
        """Measure weight number `index`, which has its values now; keep none of them below m = n.

        Raises:
            InputError: A weight is not finite.
        """
        weight = self._weights[index]
        scale = self.scales[index] = initial_scale_of(weight)
        if self._mapping.is_bijection:
            dense = weight.tensor.detach().reshape(-1).to(self._folded.dtype)
            self._mapping.scatter(dense, self._mapping.spans[index], 1 / scale, self._folded)

    def values(self, shared: SharedVector, seed: int) -> Tensor:
        """Draw phi: N(0, nu_b^2), or what gives the dense weights where every slot holds one.

        Returns:
            Shape (m,), in the dtype of the weights.
        """
        forward, _ = shared.slot_factors(self._device, self._folded.dtype)
        nu = torch.where(forward > 0, 1 / forward, 0)
        if self._mapping.is_bijection:
            return self._mapping.scale(self._folded, nu).to(self._dtype)
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
