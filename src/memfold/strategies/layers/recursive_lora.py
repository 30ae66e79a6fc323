"""Relaxed recursion: layers share their weights, and each adds a low-rank difference of its own.

Bae et al., "Relaxed recursive transformers: effective parameter sharing with layer-wise LoRA", ICLR
2025, arXiv 2410.20672.

    W_l = D[m(l)] + U_l V_l              U_l: rows x r,  V_l: r x columns

At rank 0, tied layers; at full rank, any layers. Two layers that start as one, or around their
mean, differ from it by opposite amounts: W = D + U V and D - U V, one difference for both.
What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations
and operations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from warnings import warn

import torch
from torch import Tensor

from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.strategy import Context, Ratios
from memfold.options import Count
from memfold.seeding import derive_seed
from memfold.strategies.factoring.matrices import (
    matrix_of,
    matrix_shape,
    spectral_factors,
    weight_of,
)
from memfold.strategies.layers.maps import looped_map
from memfold.strategies.layers.repeated import Layers, Stack
from memfold.strategies.layers.tied import Tied, TiedWeights

__all__ = ["RecursiveLora", "RecursiveLoraWeights"]


@dataclass(frozen=True, kw_only=True)
class RecursiveLora(Tied, name="recursive_lora"):
    """Tied layers with differences, whose rank is what `ratio` allows."""

    ratios: ClassVar[Ratios] = "steps"
    default_ratio: ClassVar[float] = 0.6
    """Half is what two layers share."""

    loops: Count = 2
    """Layers that share one weight, where `map` is a rule."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return the ranks there may be."""
        shapes = map(matrix_shape, stack.shapes.values())
        return range(1 + max(min(shape) for shape in shapes))

    def make(self, layers: Layers, size: int) -> "RecursiveLoraWeights":
        """See `LayerStrategy.make`."""
        entries = looped_map(self.map, len(layers.stack), self.loops)
        return RecursiveLoraWeights(self, layers, entries, size)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Fit the differences to what the shared weights leave, or begin with none."""
        assert isinstance(made, RecursiveLoraWeights)
        if not made.rank:
            asked = f"ratio={self.asked_ratio}" if self.budget_bytes is None else "budget_bytes"
            message = f"compression={self.name}: {asked} leaves nothing for differences, "
            warn(message + "layers are tied as with compression=tied", stacklevel=2)
        parts = dict(super().start(made, layers, context))
        shared = dict(zip(made.firsts, parts["tied"], strict=True))
        fits = self.initial_values == "least_squares"
        down, up = list[Tensor](), list[Tensor]()
        for index in made.differences():
            seed = derive_seed(self.seed, "difference", made.names[index])
            generator = torch.Generator("cpu").manual_seed(seed)
            left_over = layers.weights[index].tensor.detach() - shared[made.first(index)]
            residual = matrix_of(left_over if fits else torch.zeros_like(left_over))
            rank = made.rank_of(index)
            # Where nothing is left over, what comes first is random and what comes last is zero.
            first, last = spectral_factors(residual.T, rank, generator)
            down.append(first.T.contiguous().to(residual))
            up.append(last.to(residual))
        return {**parts, "down": down, "up": up}


class RecursiveLoraWeights(TiedWeights):
    """Beside the tied ones `<weight>_down` (r, columns) and `<weight>_up` (rows, r) at each."""

    def __init__(
        self, strategy: RecursiveLora, layers: Layers, entries: tuple[int, ...], rank: int
    ) -> None:
        """Take note of the layers, the map and the rank, which no matrix exceeds."""
        around_mean = strategy.initial_values == "random" or strategy.block == "average"
        opposite = around_mean and set(Counter(entries).values()) <= {1, 2}
        level: Level = "group" if opposite else "weight"
        more: dict[str, Level] = {"down": level, "up": level} if rank else {}
        super().__init__(strategy, layers, entries, more)
        self.rank = rank
        self._opposite = opposite

    def differences(self) -> list[int]:
        """Return the weights with a difference of their own."""
        return [i for i in self.computed if not self._opposite or i == self.first(i)]

    def rank_of(self, index: int) -> int:
        """Return the rank of the difference of weight number `index`."""
        return min(self.rank, *matrix_shape(self.shapes[index]))

    def weight(self, index: int) -> Tensor:
        """Add the difference."""
        shared = super().weight(index)
        if "up" not in self.parts:
            return shared
        up, down = self.part(index, "up"), self.part(index, "down")
        with torch.autocast(up.device.type, enabled=False):
            sign = -1 if self._opposite and index != self.first(index) else 1
            return shared + sign * weight_of(up @ down, self.shapes[index])

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        if name not in ("down", "up"):
            return super().part_shape(index, name)
        rows, columns = matrix_shape(self.shapes[index])
        rank = self.rank_of(index)
        return (rank, columns) if name == "down" else (rows, rank)
