"""MASA: the matrices of all layers are sums of the same few, the atoms.

"Share your attention: transformer weight sharing via matrix-based dictionary learning", AAAI 2026,
arXiv 2508.04581.

    W_l = sum_s c_ls D_s                a dictionary for each projection, S atoms in it
    W_l = sum_s c_ls diag(g_ls) D_s     with `gains`, a number for each atom, layer and row
    c_lk = P_k(t_l)                     with `coefficients=polynomial`, nothing stored: Legendre's
                                        polynomials at t from -1 to 1
    c_l = h_l + network(e_l)            with `coefficients=network`; c is stored, the network not

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations
and operations, to which building the weights is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Strategy
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.layers.atoms import fit, legendre, nearest, spread
from memfold.strategies.layers.base import LayerStrategy, LayerWeights
from memfold.strategies.layers.coefficient_networks import (
    NETWORK_PARTS,
    network_output,
    network_shapes,
    network_start,
)
from memfold.strategies.layers.matrix_kinds import patterns_of
from memfold.strategies.layers.repeated import Layers, Stack

__all__ = ["Masa", "MasaWeights"]


@dataclass(frozen=True, kw_only=True)
class Masa(LayerStrategy, name="masa"):
    """Queries, keys and values are mixed from atoms; `ratio` says how many."""

    include: tuple[str, ...] = ("q", "k", "v")
    """Projections by their kind (`q`, `k`, `v`, `o`), or patterns as elsewhere."""
    coefficients: Literal["trained", "network", "polynomial"] = "trained"
    """Whether each layer's are trained, come from a trained network that no file holds, or follow
    from its depth."""
    gains: bool = False
    """Whether each row of an atom has a trained factor in each layer."""
    initial_values: Literal["random", "least_squares"] = "random"
    """Whether atoms start as the weights of layers, evenly spaced, which the layers around them
    take over; or as what comes nearest to all weights, which is for trained ones."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: A network is to give coefficients that were fitted, or are rounded.
        """
        super().__post_init__()
        if self.coefficients == "network" and (self.initial_values != "random" or self.train_bits):
            raise InputError(
                "compression.coefficients=network takes neither compression.initial_values="
                "least_squares nor artifact.train_bits: compression.coefficients=trained does"
            )

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many atoms there may be."""
        return range(1, len(stack) + 1)

    def make(self, layers: Layers, size: int) -> "MasaWeights":
        """See `LayerStrategy.make`."""
        return MasaWeights(self, layers, size)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Fit the atoms and coefficients of each projection."""
        assert isinstance(made, MasaWeights)
        fits = self.initial_values == "least_squares"
        if not fits and made.num_atoms < len(layers.stack):
            message = f"{self.name} keeps those of some layers; compression.initial_values="
            message += "least_squares starts from what comes nearest to all of them"
            report_loss(layers.weights, context, message)
        atoms, mixes = [], dict[int, Tensor]()
        for numbers in layers.stack.weights.values():
            matrices = torch.stack([layers.weights[i].tensor.detach() for i in numbers])
            begin = fit if fits else spread
            found, mixed = begin(matrices, made.num_atoms, polynomial=made.is_polynomial)
            atoms.append(found.to(matrices))
            mixes |= dict(zip(numbers, mixed.to(matrices, copy=True).unbind(), strict=True))
        like = layers.weights[0].tensor.detach()
        ones = [like.new_ones(tuple(made.part_shape(i, "gains"))) for i in made.computed]
        parts = {"atoms": atoms, "coefficients": [mixes[i] for i in made.computed], "gains": ones}
        for name in NETWORK_PARTS.keys() & made.parts.keys():
            of = made.computed if made.parts[name] == "weight" else made.firsts
            seeds = (derive_seed(self.seed, name, layers.weights[index].name) for index in of)
            shape = network_shapes(made.num_atoms)[name]
            parts[name] = [network_start(name, shape, seed).to(like) for seed in seeds]
        return parts

    @property
    def stored(self) -> "Masa":
        """See `Strategy.stored`: what a network gave is trained on as it is."""
        is_network = self.coefficients == "network"
        return replace(self, coefficients="trained") if is_network else self

    def _select(self, model: nn.Module) -> tuple[CompressibleWeight, ...]:
        return Strategy._select(replace(self, include=patterns_of(model, self.include)), model)


class MasaWeights(LayerWeights):
    """`<weight>_atoms` at the first layer; `<weight>_coefficients` and `<weight>_gains` at each.

    In place of coefficients, those of `coefficients=network` have the parts of `NETWORK_PARTS`.
    """

    values_name: ClassVar[str] = "atom_values"
    root_names: ClassVar[tuple[str, ...]] = (values_name,)

    def __init__(self, strategy: Masa, layers: Layers, num_atoms: int) -> None:
        """Take note of the layers, and of S, which is the same for every projection."""
        stored: dict[str, Level] = {"atoms": "group"}
        if strategy.coefficients != "polynomial":
            stored["coefficients"] = "weight"
        if strategy.gains:
            stored["gains"] = "weight"
        self._stored = stored
        parts = dict(stored)
        if strategy.coefficients == "network":
            del parts["coefficients"]
            parts |= NETWORK_PARTS
        groups = list(layers.stack.weights.values())
        super().__init__(strategy, layers, groups, parts)
        self.num_atoms = num_atoms
        self._depths = {index: depth for group in groups for depth, index in enumerate(group)}
        self.is_polynomial = strategy.coefficients == "polynomial"
        start = legendre if self.is_polynomial else nearest
        self._fixed = start(len(layers.stack), num_atoms)

    @property
    def stored_parts(self) -> Mapping[str, Level]:
        """See `PartValues.stored_parts`: coefficients, not the network that gives them."""
        return self._stored

    def stored_part(self, index: int, name: str) -> Tensor:
        """See `PartValues.stored_part`."""
        return self.coefficients(index) if name == "coefficients" else self.part(index, name)

    def coefficients(self, index: int) -> Tensor:
        """Return c_l of weight number `index`, shape (S,)."""
        if "coefficients" in self.parts:
            return self.part(index, "coefficients")
        fixed = self._fixed[self._depths[index]].to(self.part(index, "atoms"))
        if "embedding" not in self.parts:
            return fixed
        return fixed + network_output(*(self.part(index, name) for name in NETWORK_PARTS))

    def weight(self, index: int) -> Tensor:
        """Mix the atoms."""
        atoms = self.part(index, "atoms")
        with torch.autocast(atoms.device.type, enabled=False):
            mixed = self.coefficients(index)
            if "gains" not in self.parts:
                return torch.tensordot(mixed, atoms, 1)
            factors = mixed[:, None] * self.part(index, "gains")
            return torch.einsum("sr,sr...->r...", factors, atoms)

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        shape, atoms = self.shapes[index], self.num_atoms
        shapes = {"atoms": (atoms, *shape), "coefficients": (atoms,), "gains": (atoms, shape[0])}
        return (shapes | network_shapes(atoms))[name]
