"""Basis sharing: adjacent layers are mixed from one basis of the space of their inputs.

"Basis Sharing: cross-layer parameter sharing for large language model compression", ICLR 2025,
arXiv 2410.03765.

    W_l = C_l B,    l in a group of n adjacent layers       B: k x columns,  C_l: rows x k
    [W_1; ...; W_n] T = U S V^T,   C = U_k sqrt(S_k),  B = sqrt(S_k) V_k^T T^-1    at the start

T is the identity, which gives the nearest weights, or T T^T = sum X^T X over the inputs X of the
group's layers, which gives the nearest outputs. With n = 1 and the identity, low rank. What
shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations and
operations, because the dense weight is built for every pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memfold.compression.moments import input_moments
from memfold.compression.part_values import PartValues
from memfold.compression.samples import take_batches
from memfold.compression.strategy import Context, Ratios
from memfold.options import Count
from memfold.seeding import derive_seed
from memfold.strategies.factoring.matrices import (
    largest_rank,
    matrix_of,
    matrix_shape,
    spectral_factors,
    weight_of,
)
from memfold.strategies.layers.base import LayerStrategy, LayerWeights
from memfold.strategies.layers.repeated import Layers, Stack

__all__ = ["Basis", "BasisWeights"]


@dataclass(frozen=True, kw_only=True)
class Basis(LayerStrategy, name="basis"):
    """Train a basis for each group of layers, and what each layer makes of it."""

    ratios: ClassVar[Ratios] = "steps"
    trains_matrices: ClassVar[bool] = True

    group_size: Count = 2
    """Adjacent layers with one basis; the last group may have fewer."""
    nearest: Literal["weights", "outputs"] = "weights"
    """What the start comes as near to as the rank allows: the layers' weights, or what they give on
    samples of the training set, which is for trained ones."""
    num_samples: Count = 256
    """Samples for `nearest=outputs`."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return the ranks there may be, of the matrix that allows the largest."""
        num = min(self.group_size, len(stack))
        return range(1, 1 + max(_largest(shape, num) for shape in stack.shapes.values()))

    def make(self, layers: Layers, size: int) -> "BasisWeights":
        """See `LayerStrategy.make`."""
        groups, ranks = [], dict[int, int]()
        for name, numbers in layers.stack.weights.items():
            for first in range(0, len(numbers), self.group_size):
                group = numbers[first : first + self.group_size]
                groups.append(group)
                largest = _largest(layers.stack.shapes[name], len(group))
                ranks |= dict.fromkeys(group, min(size, largest))
        return BasisWeights(self, layers, groups, ranks)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Take the largest singular values of the layers of a group, one above the other."""
        assert isinstance(made, BasisWeights)
        weights, roots = layers.weights, {}
        if self.nearest == "outputs":
            asker = f"compression={self.name}"
            samples = take_batches(asker, context.data, num_samples=self.num_samples)
            inside = [index for group in made.groups for index in group]
            found = input_moments(made.model, [weights[i] for i in inside], samples)
            moments = dict(zip(inside, found, strict=True))
            sums = {
                group[0]: torch.stack([moments[i] for i in group]).sum(0) for group in made.groups
            }
            roots = {first: root_of(moment) for first, moment in sums.items()}
        bases, mixes = [], dict[int, Tensor]()
        for group in sorted(made.groups, key=min):
            matrices = [matrix_of(weights[i].tensor.detach()) for i in group]
            seed = derive_seed(self.seed, "basis", weights[group[0]].name)
            generator = torch.Generator("cpu").manual_seed(seed)
            rank, like, stacked = made.ranks[group[0]], matrices[0], torch.cat(matrices)
            if group[0] in roots:
                root = roots[group[0]]
                left, right = spectral_factors(stacked.double().cpu() @ root, rank, generator)
                basis = torch.linalg.solve_triangular(root, right.T, upper=False, left=False)
            else:
                left, right = spectral_factors(stacked, rank, generator)
                basis = right.T
            bases.append(basis.contiguous().to(like))
            parts = left.to(like).split([len(matrix) for matrix in matrices])
            mixes |= {index: part.clone() for index, part in zip(group, parts, strict=True)}
        return {"basis": bases, "mix": [mixes[index] for index in made.computed]}


class BasisWeights(LayerWeights):
    """`<weight>_basis` (k, columns) at the first layer of a group, `<weight>_mix` (rows, k)."""

    values_name: ClassVar[str] = "basis_values"
    root_names: ClassVar[tuple[str, ...]] = (values_name,)

    def __init__(
        self,
        strategy: Basis,
        layers: Layers,
        groups: Sequence[Sequence[int]],
        ranks: Mapping[int, int],
    ) -> None:
        """Take note of groups and of the rank k of each weight in them."""
        super().__init__(strategy, layers, groups, {"basis": "group", "mix": "weight"})
        self.groups = groups
        self.ranks = ranks

    def weight(self, index: int) -> Tensor:
        """Multiply, in the dtype of the parts."""
        basis, mix = self.part(index, "basis"), self.part(index, "mix")
        with torch.autocast(basis.device.type, enabled=False):
            return weight_of(mix @ basis, self.shapes[index])

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        rows, columns = matrix_shape(self.shapes[index])
        rank = self.ranks[index]
        return (rank, columns) if name == "basis" else (rows, rank)


def root_of(moment: Tensor) -> Tensor:
    """Return a lower triangular T with T T^T = a second moment, float64, raised to be definite."""
    values = torch.linalg.eigvalsh(moment)
    least = 1e-10 * (values[-1] if values[-1] > 0 else 1.0)
    raised = (least - values[0]).clamp_min(0.0)
    return torch.linalg.cholesky(moment + raised * torch.eye(len(moment), dtype=moment.dtype))


def _largest(shape: Sequence[int], num_layers: int) -> int:
    """Return the largest rank at which so many weights are fewer numbers than dense, or 1."""
    rows, columns = matrix_shape(shape)
    return max(1, largest_rank((rows * num_layers, columns)))
