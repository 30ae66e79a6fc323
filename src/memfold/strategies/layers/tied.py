"""Tied layers: L layers compute with the weights of K, in the order of a map.

Lan et al., "ALBERT", ICLR 2020, arXiv 1909.11942; Takase and Kiyono, "Lessons on parameter sharing
across layers in transformers", 2021, arXiv 2104.06022; Bae et al., arXiv 2507.10524.

    W_l = s_l D[m(l)]            m: see `maps.py`; s_l: one number per row, with `loop_scale`

Parameters are tied, modules are not: every position keeps its norms and biases, its dropout, and
its place in a cache of keys and values. What shrinks: parameters, gradients, optimizer state, what
DDP reduces. What does not: activations, operations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.budget import Stored
from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.strategy import Context
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.strategies.layers.base import LayerStrategy, LayerWeights
from memfold.strategies.layers.gradients import factor_of, scale_gradient
from memfold.strategies.layers.maps import Entries, LayerMap, check_map, depths_of, layer_map
from memfold.strategies.layers.others import shared_names, tie_others, untie
from memfold.strategies.layers.repeated import Layers, Stack
from memfold.strategies.sharing.gradient_scale import GradientScale

__all__ = ["Tied", "TiedWeights", "TyingStrategy"]


Whose = Literal["own", "shared"]


@dataclass(frozen=True, kw_only=True)
class TyingStrategy(LayerStrategy):
    """Repeated layers share their weights, in the order of a map that the strategy makes."""

    norms: Whose = "own"
    """Whose norms and biases each position has."""
    biases: Whose | None = None
    """Whose biases each position has, if not as `norms` says; those of norms, too."""
    loop_scale: bool = False
    """Multiply the outputs of every tied weight by a trained number each, own for each position."""
    gradient_scale: GradientScale = "length"
    """Of a weight that is used B times: 1/sqrt(B), which keeps the length of the dense model's
    step, 1/B, or none. Adam does not see it."""
    initial_values: Literal["random", "least_squares"] = "random"
    """Whether what is shared starts as in the first layer that uses it; or as `block` says, which
    is for trained values."""
    block: Literal["average", "stepwise", "lower", "named"] = "average"
    """The mean of the layers that share; layers at equal steps from the first to the last; the
    lowest ones, whatever the map; or those that a list as `map` names."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: `block` wants a list, and there is none.
        """
        super().__post_init__()
        if self.block == "named" and not isinstance(getattr(self, "map", None), tuple):
            raise InputError(
                "compression.block=named needs a list of layers as compression.map, which tied and "
                "recursive_lora take"
            )

    @property
    def starts_as_named(self) -> bool:
        """Whether every position starts as the layer that its entry of `map` names."""
        return self.block == "named" and self.initial_values == "least_squares"

    @property
    def ties_untouched(self) -> bool:
        """See `Strategy.ties_untouched`: norms."""
        return "shared" in (self.norms, self.biases)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Begin with the values of layers, or with means of them."""
        assert isinstance(made, TiedWeights)
        fits = self.initial_values == "least_squares"
        made.block = self.block if fits else None
        values = [weight.tensor.detach() for weight in layers.weights]
        dropped = [index for index in made.computed if index != made.first(index)]
        if dropped and not fits:
            message = f"{self.name} keeps those of the first layer that uses each; "
            message += "compression.initial_values=least_squares starts from all of them"
            report_loss([layers.weights[i] for i in dropped], context, message)
        tied = []
        for first in made.firsts:
            (numbers,) = (found for found in layers.stack.weights.values() if first in found)
            places = made.starts_as(made.map[numbers.index(first)])
            tied.append(torch.stack([values[numbers[place]] for place in places]).mean(0))
        like = values[0]
        scales = [like.new_ones(tuple(made.part_shape(i, "scale"))) for i in made.computed]
        return {"tied": tied, "scale": scales}


@dataclass(frozen=True, kw_only=True)
class Tied(TyingStrategy, name="tied"):
    """Repeated layers share their weights; norms and biases stay each layer's own."""

    map: LayerMap | Entries = "cycle"
    """Whose weights each position uses: a rule, of which `ratio` says how many layers have weights
    of their own, or a list with one entry for each position: `[0,1,1,2]`."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many layers may have weights of their own."""
        if isinstance(self.map, tuple):
            return [len(set(check_map(self.map, len(stack))))]
        depths = depths_of(self.map, len(stack))
        if not depths:
            raise InputError(
                f"compression.map={self.map} needs 3 repeated layers or more, this model has "
                f"{len(stack)}"
            )
        return depths

    def make(self, layers: Layers, size: int) -> "TiedWeights":
        """See `LayerStrategy.make`."""
        entries = layer_map(self.map, len(layers.stack), size)
        return TiedWeights(self, layers, entries)


class TiedWeights(LayerWeights):
    """`<weight>_tied` at the first layer that uses it; `<weight>_scale` (rows, 1, ...) at each.

    A weight that one layer uses is that layer's, and stays whole, unless it starts as another's.
    """

    values_name: ClassVar[str] = "layer_values"
    root_names: ClassVar[tuple[str, ...]] = (values_name,)

    def __init__(
        self,
        strategy: TyingStrategy,
        layers: Layers,
        entries: tuple[int, ...],
        more: Mapping[str, Level] | None = None,
    ) -> None:
        """Take note of the layers and of the map; `more` names parts of a subclass."""
        # A position alone with its weights may still start as a layer that the map names.
        least = 1 if strategy.starts_as_named else 2
        groups = [
            group
            for numbers in layers.stack.weights.values()
            for own in sorted(set(entries))
            if len(group := [n for n, e in zip(numbers, entries, strict=True) if e == own]) >= least
        ]
        parts: dict[str, Level] = {"tied": "group"}
        if strategy.loop_scale:
            parts["scale"] = "weight"
        parts |= dict(more or {})
        self._on_root = [name for name, level in parts.items() if level == "model"]
        super().__init__(strategy, layers, groups, parts)
        self.map = entries
        self.stack = layers.stack
        self.uses = {index: group for group in groups for index in group}
        self._factors = {
            index: factor_of(strategy.gradient_scale, len(group))
            for index, group in self.uses.items()
        }
        kinds = strategy.norms == "shared", (strategy.biases or strategy.norms) == "shared"
        self._shared = shared_names(layers.model, layers.stack, *kinds)
        self.block: str | None = None
        """What shared values start as; `None`: those of the first layer that uses them."""
        self._others: list[tuple[nn.Module, str]] = []

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`."""
        super().attach(parts)
        if self._shared:
            starts = [self.starts_as(own) for own in range(1 + max(self.map))]
            self._others = tie_others(self.model, self.stack, self.map, starts, self._shared)

    def described(self, dtype: torch.dtype) -> Stored:
        """See `PartValues.described`: with the norms and biases that become one."""
        firsts: dict[int, str] = {}
        ties = {
            f"{path}.{name}": f"{first}.{name}"
            for path, entry in zip(self.stack.paths, self.map, strict=True)
            if (first := firsts.setdefault(entry, path)) != path
            for name in self._shared
        }
        return replace(super().described(dtype), ties=ties)

    @property
    def lost_bytes(self) -> int:
        """See `Compression.lost_bytes`: norms and biases that are another layer's now."""
        return sum(module.get_parameter(name).nbytes for module, name in self._others)

    def restore_dense(self) -> None:
        """See `Compression.restore_dense`; what hooks need on the root stays."""
        kept = {name: getattr(self.model, name) for name in self._on_root}
        super().restore_dense()
        untie(self._others)
        for name, parameter in kept.items():
            self.model.register_parameter(name, parameter)

    def weight(self, index: int) -> Tensor:
        """Return the shared parameter, as a view, or with its rows scaled."""
        shared = scale_gradient(self.part(index, "tied"), self._factors[index])
        return shared * self.part(index, "scale") if "scale" in self.parts else shared

    def current_weight(self, index: int) -> Tensor:
        """See `ComputedWeights.current_weight`; where nothing is computed, nothing is kept.

        No weight depends on what hooks need on the root.
        """
        is_direct = len(self.parts) == 1 or self._on_root
        return self.weight(index) if is_direct else super().current_weight(index)

    def marks(self, *places: Tensor) -> Tensor:
        """See `ComputedWeights.marks`: the map tells where values belong."""
        return super().marks(torch.tensor(self.map), *places)

    def reach(self, parameter: Tensor) -> Tensor | None:
        """See `Compression.reach`: every use moves with an entry; scales are not counted."""
        for index in self.computed:
            if parameter is self.part(index, "tied"):
                uses = self.uses[index]
                if "scale" not in self.parts:
                    return torch.full_like(parameter, len(uses) ** 0.5)
                scales = [self.part(use, "scale").detach().square() for use in uses]
                return torch.stack(scales).sum(0).sqrt().expand_as(parameter)
        return None

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        rows, *others = self.shapes[index]
        return (rows, *(1 for _ in others)) if name == "scale" else self.shapes[index]

    def starts_as(self, own: int) -> list[int]:
        """Return the positions of whose layers the one with that entry starts as the mean."""
        uses = [place for place, entry in enumerate(self.map) if entry == own]
        match self.block:
            case "average":
                return uses
            case "stepwise":
                return [round(own * (len(self.map) - 1) / max(1, max(self.map)))]
            case "lower":
                return [own]
            case "named":
                assert isinstance(self.strategy, Tied)
                assert isinstance(self.strategy.map, tuple)
                return [self.strategy.map[uses[0]]]
        return uses[:1]
