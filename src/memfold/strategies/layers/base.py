"""Strategies that give repeated layers parts in common, of a size that the budget allows."""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from memfold.compression.budget import Budget, Stored
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Ratios, Strategy
from memfold.errors import InputError
from memfold.strategies.layers.repeated import Layers, Stack, stack_of

__all__ = ["LayerStrategy", "LayerWeights"]


class LayerWeights(PartValues):
    """Weights of repeated layers that have parts in common; all others stay whole."""

    def __init__(
        self,
        strategy: Strategy,
        layers: Layers,
        groups: Sequence[Sequence[int]],
        parts: Mapping[str, Level],
    ) -> None:
        """Take note of the groups; `attach` then replaces the weights.

        Args:
            strategy: Which one compresses.
            layers: What it compresses.
            groups: Numbers of those that share parts, in the order of their layers.
            parts: See `ComputedWeights.parts`.

        Raises:
            InputError: The name of a part is taken.
        """
        self.parts = parts
        inside = {index for group in groups for index in group}
        whole = [index for index in range(len(layers.weights)) if index not in inside]
        super().__init__(strategy, layers.model, layers.weights, groups=groups, whole=whole)

    @property
    def firsts(self) -> list[int]:
        """First weight of every group, in the order in which `attach` takes their parts."""
        return sorted({self.first(index) for index in self.computed})


@dataclass(frozen=True, kw_only=True)
class LayerStrategy(Strategy):
    """Replace the weights of repeated layers; all others stay whole, and count as values."""

    ratios: ClassVar[Ratios] = "few"
    unshardable: ClassVar[str | None] = (
        "layers read each other's parameters; use trainer=ddp, which reduces them once"
    )

    layers: str | None = None
    """Glob of the paths of the repeated layers; null finds the longest list of equal ones."""

    @abstractmethod
    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return what the budget may choose from, ascending, so that more values are stored.

        Raises:
            InputError: There is none for these layers.
        """

    @abstractmethod
    def make(self, layers: Layers, size: int) -> PartValues:
        """Take note of the weights, for one of `sizes`; nothing is replaced yet."""

    @abstractmethod
    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Return the parts at the start of the training, as `ComputedWeights.attach` takes them.

        Those of groups are in the order of `LayerWeights.firsts`, which need not be that in which
        `make` has named the groups; those of weights in the order of `computed`.
        """

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> PartValues:
        """See `Strategy.build`."""
        layers = self._layers(model, weights)
        made = self._fitting(layers)
        made.attach(self.start(made, layers, context))
        return made

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> PartValues:
        """See `Strategy.rebuild`."""
        layers = self._layers(model, weights)
        sizes = self.sizes(layers.stack)
        place = bisect_left(sizes, num_values, key=self._count(layers))
        made = self.make(layers, sizes[min(place, len(sizes) - 1)])
        if made.num_values != num_values:
            raise InputError(
                f"the artifact has {num_values} values, which no compression={self.name} of "
                f"{len(layers.stack)} such layers has"
            )
        made.accept(weights, tensors)
        return made

    def _layers(self, model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> Layers:
        check_replaceable(model, weights)
        return Layers(model, weights, stack_of(model, weights, self.layers))

    def _count(self, layers: Layers) -> Callable[[int], int]:
        return lambda size: self.make(layers, size).num_values

    def _fitting(self, layers: Layers) -> PartValues:
        sizes, dtype = self.sizes(layers.stack), layers.weights[0].tensor.dtype
        if self.budget_bytes is not None:

            def choose(number: int) -> Stored:
                return self.make(layers, sizes[number]).described(dtype)

            needs = f"the least of {self.name} for {len(layers.stack)} layers"
            budget = Budget(self, layers.model, layers.weights)
            return self.make(layers, sizes[budget.most(choose, 0, len(sizes) - 1, needs)])
        wanted, count = self.target_values(layers.weights), self._count(layers)
        place = bisect_left(sizes, wanted, key=count)
        nearest = min(sizes[max(0, place - 1) : place + 1], key=lambda s: abs(count(s) - wanted))
        return self.make(layers, nearest)
