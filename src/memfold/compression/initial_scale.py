"""How far the initial weights of a tensor spread, for strategies that draw others like them."""

from math import isfinite, prod

import numpy as np
import torch
from torch import Tensor

from memfold.compression.initial_values import in_memory_order
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError

__all__ = ["initial_scale_of"]

# Weights that are measured at a time: their float64 copies stay in a processor's cache.
_CHUNK_NUMEL = 1 << 17


def initial_scale_of(weight: CompressibleWeight) -> float:
    """Measure lambda: the standard deviation of a tensor's initial weights, as a float32 number.

    A constant tensor (zero-initialised heads, one-element weights) has none. Its absolute value
    stands in for it; for zeros, the standard deviation 1 / sqrt(3 fan_in) that PyTorch's own
    default initialisation would have had, or for a bias that of the weight beside it: it is the
    weight of an input that is always 1.

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
        spread = _of_zeros(weight)
    return max(float(np.float32(spread)), float(np.finfo(np.float32).tiny))


def _of_zeros(weight: CompressibleWeight) -> float:
    beside = weight.beside if weight.is_bias else None
    spread = 0.0 if beside is None else _standard_deviation(in_memory_order(beside.detach()))
    return spread or (3 * prod(weight.shape[1:] or weight.shape)) ** -0.5


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
