"""MASA: the matrices of all layers are sums of the same few, the atoms.

"Share your attention: transformer weight sharing via matrix-based dictionary learning", AAAI 2026,
arXiv 2508.04581.

    W_l = sum_s c_ls D_s                a dictionary for each projection, S atoms in it
    W_l = sum_s c_ls diag(g_ls) D_s     with `gains`, a number for each atom, layer and row
    c_lk = P_k(t_l)                     with `coefficients=polynomial`, nothing stored: Legendre's
                                        polynomials at t from -1 to 1

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations
and operations, to which building the weights is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Strategy
from memfold.compression.trained_values import report_loss
from memfold.strategies.layers.base import LayerStrategy, LayerWeights
from memfold.strategies.layers.projections import patterns_of
from memfold.strategies.layers.repeated import Stack

__all__ = ["Masa", "MasaWeights"]


@dataclass(frozen=True, kw_only=True)
class Masa(LayerStrategy, name="masa"):
    """Queries, keys and values are mixed from atoms; `ratio` says how many."""

    include: tuple[str, ...] = ("q", "k", "v")
    """Projections by their kind (`q`, `k`, `v`, `o`), or patterns as elsewhere."""
    coefficients: Literal["trained", "polynomial"] = "trained"
    """Whether each layer's are trained, or follow from its depth."""
    gains: bool = False
    """Whether each row of an atom has a trained factor in each layer."""
    initial_values: Literal["random", "least_squares"] = "random"
    """Whether atoms start as the weights of layers, evenly spaced, which the layers around them
    take over; or as what comes nearest to all weights, which is for trained ones."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many atoms there may be."""
        return range(1, len(stack) + 1)

    def make(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        size: int,
    ) -> "MasaWeights":
        """See `LayerStrategy.make`."""
        return MasaWeights(self, model, weights, stack, size)

    def start(
        self,
        made: PartValues,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        context: Context,
    ) -> Mapping[str, list[Tensor]]:
        """Fit the atoms and coefficients of each projection."""
        assert isinstance(made, MasaWeights)
        fits = self.initial_values == "least_squares"
        if not fits and made.num_atoms < len(stack):
            message = f"{self.name} keeps those of some layers; compression.initial_values="
            message += "least_squares starts from what comes nearest to all of them"
            report_loss(weights, context, message)
        atoms, mixes = [], dict[int, Tensor]()
        for numbers in stack.weights.values():
            layers = torch.stack([weights[i].tensor.detach() for i in numbers])
            found, mixed = made.fit(layers) if fits else made.spread(layers)
            atoms.append(found.to(layers))
            mixes |= dict(zip(numbers, mixed.to(layers, copy=True).unbind(), strict=True))
        like = weights[0].tensor.detach()
        ones = [like.new_ones(tuple(made.part_shape(i, "gains"))) for i in made.computed]
        return {"atoms": atoms, "coefficients": [mixes[i] for i in made.computed], "gains": ones}

    def _select(self, model: nn.Module) -> tuple[CompressibleWeight, ...]:
        return Strategy._select(replace(self, include=patterns_of(model, self.include)), model)


class MasaWeights(LayerWeights):
    """`<weight>_atoms` at the first layer; `<weight>_coefficients` and `<weight>_gains` at each."""

    values_name: ClassVar[str] = "atom_values"
    root_names: ClassVar[tuple[str, ...]] = (values_name,)

    def __init__(
        self,
        strategy: Masa,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        num_atoms: int,
    ) -> None:
        """Take note of the layers, and of S, which is the same for every projection."""
        parts: dict[str, Level] = {"atoms": "group"}
        if strategy.coefficients == "trained":
            parts["coefficients"] = "weight"
        if strategy.gains:
            parts["gains"] = "weight"
        groups = list(stack.weights.values())
        super().__init__(strategy, model, weights, groups, parts)
        self.num_atoms = num_atoms
        self._depths = {index: depth for group in groups for depth, index in enumerate(group)}
        self._polynomials = legendre(len(stack), num_atoms)

    def weight(self, index: int) -> Tensor:
        """Mix the atoms."""
        atoms = self.part(index, "atoms")
        if "coefficients" in self.parts:
            mixed = self.part(index, "coefficients")
        else:
            mixed = self._polynomials[self._depths[index]].to(atoms)
        with torch.autocast(atoms.device.type, enabled=False):
            if "gains" not in self.parts:
                return torch.tensordot(mixed, atoms, 1)
            factors = mixed[:, None] * self.part(index, "gains")
            return torch.einsum("sr,sr...->r...", factors, atoms)

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        shape = self.shapes[index]
        shapes = {"atoms": (self.num_atoms, *shape), "coefficients": (self.num_atoms,)}
        return shapes.get(name, (self.num_atoms, shape[0]))

    def spread(self, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Take evenly spaced layers for atoms, and for each layer the one that it is nearest to.

        Args:
            layers: The weights of one projection, shape (L, ...).

        Returns:
            Atoms (S, ...) and coefficients (L, S); at S = L, the layers themselves.
        """
        depth, atoms = len(layers), self.num_atoms
        homes = torch.arange(depth) * atoms // depth
        if "coefficients" in self.parts:
            firsts = [int((homes == atom).nonzero()[0]) for atom in range(atoms)]
            return layers[firsts].clone(), torch.eye(atoms)[homes]
        # All layers start as one, which the constant polynomial stands for.
        start = torch.zeros(atoms, *layers.shape[1:]).to(layers)
        start[0] = layers[0]
        return start, self._polynomials

    def fit(self, layers: Tensor) -> tuple[Tensor, Tensor]:
        """Fit atoms and coefficients to weights by least squares: the principal components.

        Args:
            layers: See `spread`.

        Returns:
            See `spread`; float64.
        """
        flat = layers.double().flatten(1)
        if "coefficients" in self.parts:
            mixed = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, : self.num_atoms]
            atoms = mixed.T @ flat
        else:
            mixed = self._polynomials
            atoms = torch.linalg.lstsq(mixed, flat).solution
        return atoms.view(self.num_atoms, *layers.shape[1:]), mixed


def legendre(num_layers: int, num_terms: int) -> Tensor:
    """Return P_k(t_l) for k < K at L points evenly spaced in [-1, 1]: float64, shape (L, K)."""
    points = np.linspace(-1, 1, num_layers)
    return torch.from_numpy(np.polynomial.legendre.legvander(points, num_terms - 1))
