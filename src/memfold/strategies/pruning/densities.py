"""How many weights each layer keeps: uniform, Erdos-Renyi (ER) and its kernel form (ERK).

Erdos-Renyi: Mocanu et al. 2018, arXiv 1707.04780. ERK and its solution: Evci et al. 2020
(RigL), arXiv 1911.11134. Layer l of N_l weights keeps the share

    rho_l = min(1, eps raw_l^p),    sum_l rho_l N_l = count

with raw_l = 1 (uniform), (n_in + n_out) / (n_in n_out) (ER), or the sum of all dimensions of its
tensor, kernel included, over their product (ERK). p is the power scale; 0 makes all uniform.
"""

from collections.abc import Sequence
from math import floor, inf, prod
from typing import Literal

from memfold.errors import InputError

__all__ = ["Distribution", "layer_counts", "layer_densities"]

Distribution = Literal["uniform", "er", "erk"]


def layer_densities(
    shapes: Sequence[Sequence[int]],
    count: int,
    kind: Distribution,
    *,
    dense_first: bool = False,
    power_scale: float = 1.0,
) -> list[float]:
    """Return the share rho_l in (0, 1] that each layer keeps: sum of rho_l N_l = `count`.

    Args:
        shapes: Of the weights, each with at least two dimensions.
        count: Weights kept in all, at least 1.
        kind: How the shares depend on the shapes.
        dense_first: Keep the first of several layers whole; the others share what is left of
            `count`.
        power_scale: Exponent p.

    Raises:
        InputError: A dense first layer leaves less than one weight for each other layer.
    """
    sizes = [prod(shape) for shape in shapes]
    assert 1 <= count <= sum(sizes)
    raw = [_raw(shape, kind) ** power_scale for shape in shapes]
    dense = {0} if dense_first and len(sizes) > 1 else set()
    if dense and count < sizes[0] + len(sizes) - 1:
        raise InputError(
            f"compression.dense_first=true keeps the {sizes[0]} weights of the first layer, and "
            f"the budget is {count} weights for all {len(sizes)} layers: give a larger one, or "
            "set dense_first to false"
        )
    while len(dense) < len(sizes):
        sparse = [i for i in range(len(sizes)) if i not in dense]
        left = count - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in sparse)
        largest = max(raw[i] for i in sparse)
        if scale * largest <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        dense |= {i for i in sparse if raw[i] == largest}
    return [1.0] * len(sizes)


def layer_counts(
    shapes: Sequence[Sequence[int]],
    count: int,
    kind: Distribution,
    *,
    dense_first: bool = False,
    power_scale: float = 1.0,
) -> list[int]:
    """Round `layer_densities` to numbers of kept weights whose sum is `count`.

    Entry j = 1, 2, ... of layer l is number (j - 1/2) / (raw_l^p N_l) in line, the method of
    Webster, but the first of each layer comes before all others: as long as `count` allows it,
    every layer keeps one weight at least. A larger `count` never takes a weight from a layer.
    Arguments and errors are those of `layer_densities`.
    """
    sizes = [prod(shape) for shape in shapes]
    densities = layer_densities(
        shapes, count, kind, dense_first=dense_first, power_scale=power_scale
    )
    shares = [_raw(shape, kind) ** power_scale * prod(shape) for shape in shapes]

    def place(layer: int, entry: int) -> tuple[float, float, int]:
        group = inf if entry > sizes[layer] else min(entry, 2)
        return group, (entry - 0.5) / shares[layer], layer

    counts = [max(1, floor(d * n + 0.5)) for d, n in zip(densities, sizes, strict=True)]
    sparse = range(1 if dense_first and len(sizes) > 1 else 0, len(sizes))
    while True:  # the line is cut where the densities say, and then moved entry by entry
        last = max(place(i, counts[i]) for i in sparse)
        following = min(place(i, counts[i] + 1) for i in sparse)
        if sum(counts) > count:
            counts[last[-1]] -= 1
        elif sum(counts) < count or following < last:
            counts[following[-1]] += 1
        else:
            return counts


def _raw(shape: Sequence[int], kind: Distribution) -> float:
    if kind == "uniform":
        return 1.0
    dims = shape[:2] if kind == "er" else shape
    return sum(dims) / prod(dims)
