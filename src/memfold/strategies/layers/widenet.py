"""WideNet: all layers share their attention, and one MLP of several experts.

Xue, Shi, Wei, Lou, Liu and You, "Go wider instead of deeper", AAAI 2022, arXiv 2107.11817.

    MLP(x) = sum over the K likeliest experts e of p_e(x) MLP_e(x),    p = softmax(x R)

Norms and biases are each layer's own, unless `norms=shared`. What shrinks: parameters, gradients,
optimizer state, what DDP reduces. What does not: activations and operations; those of the MLP are
K times as many.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memfold.compression.part_values import PartValues
from memfold.compression.selection import sample_names
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.options import Count, NonNegative, Positive
from memfold.seeding import derive_seed
from memfold.strategies.layers.experts import ROUTER, Experts, Mlp, Routes
from memfold.strategies.layers.matrix_kinds import ATTENTION
from memfold.strategies.layers.repeated import Layers, Stack
from memfold.strategies.layers.tied import TiedWeights, TyingStrategy

__all__ = ["WideNet", "WideNetWeights"]

_ROUTER_SCALE = 0.02


@dataclass(frozen=True, kw_only=True)
class WideNet(TyingStrategy, name="widenet"):
    """Share attention and experts over depth; `ratio` says how many experts."""

    default_ratio: ClassVar[float] = 0.25
    """Four experts for twelve layers of a usual transformer."""

    experts_per_token: Count = 2
    """K, or as many as there are."""
    mlp: tuple[str, ...] | None = None
    """Patterns of the matrices of the MLP; null takes those that are not called as attention's."""
    noise: NonNegative = 1.0
    """Times 1/E, the standard deviation of what is added to the router's logits in training."""
    renormalise: bool = False
    """Whether the probabilities of a token's experts are made to sum to 1."""
    capacity: Positive | None = None
    """Times K/E of the tokens of a batch, what an expert takes at most, or 1; null takes all."""
    balance: NonNegative = 0.01
    """Weight of a term of the loss that is least where experts get equally many tokens: see
    `memfold.extra_loss`. It is of each layer, and of the batch of a process."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many experts there may be."""
        return range(1, len(stack) + 1)

    def make(self, layers: Layers, size: int) -> "WideNetWeights":
        """See `LayerStrategy.make`."""
        return WideNetWeights(self, layers, size)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Begin with experts that are the MLPs of evenly spaced layers, or as `block` says."""
        assert isinstance(made, WideNetWeights)
        parts = dict(super().start(made, layers, context))
        for place, first in enumerate(made.firsts):
            if first in made.of_experts:
                values = [layers.weights[i].tensor.detach() for i in made.uses[first]]
                experts = [[values[p] for p in places] for places in made.experts_start_as()]
                parts["tied"][place] = torch.stack([torch.stack(e).mean(0) for e in experts])
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, ROUTER))
        drawn = torch.randn(made.part_shape(made.firsts[0], ROUTER), generator=generator)
        return {**parts, ROUTER: [(drawn * _ROUTER_SCALE).to(layers.weights[0].tensor.detach())]}

    def mlp_names(self, layers: Layers) -> list[str]:
        """Return the names inside a layer of the matrices of its MLP, in their order.

        Raises:
            InputError: There are fewer than two.
        """
        patterns = ATTENTION if self.mlp is None else self.mlp
        matching = {
            name
            for name, numbers in layers.stack.weights.items()
            if any(layers.weights[numbers[0]].matches(pattern) for pattern in patterns)
        }
        found = [
            name for name in layers.stack.weights if (name in matching) == (self.mlp is not None)
        ]
        if len(found) < 2:
            asked = "null" if self.mlp is None else list(self.mlp)
            raise InputError(
                f"compression.mlp={asked} finds {', '.join(found) or 'nothing'}, an MLP has two "
                f"matrices or more; a layer has {sample_names(list(layers.stack.weights))}"
            )
        return found


class WideNetWeights(TiedWeights):
    """`<weight>_tied` at the first layer, of an MLP (E, ...); the router on the root.

    The densified model keeps experts, router and hooks: no plain one has the same function.
    """

    def __init__(self, strategy: WideNet, layers: Layers, size: int) -> None:
        """Take note of the layers, and of the number of experts."""
        stack = layers.stack
        super().__init__(strategy, layers, (0,) * len(stack), {ROUTER: "model"})
        names = strategy.mlp_names(layers)
        self.size = size
        self.of_experts = {index for name in names for index in stack.weights[name]}
        routes = Routes(
            min(strategy.experts_per_token, size),
            strategy.noise,
            strategy.renormalise,
            strategy.capacity,
        )
        mlps = [Mlp.of(layers.model, [f"{path}.{name}" for name in names]) for path in stack.paths]
        self._width = mlps[0].width
        self._balance = strategy.balance
        self._experts = Experts(layers.model, mlps, routes)

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`."""
        super().attach(parts)
        self._experts.connect()

    def experts_start_as(self) -> list[Sequence[int]]:
        """Return for each expert the positions of whose MLPs it starts as the mean."""
        depth, size = len(self.map), self.size
        runs = [range(e * depth // size, (e + 1) * depth // size) for e in range(size)]
        match self.block:
            case "average":
                return [*runs]
            case "stepwise":
                return [[round(e * (depth - 1) / max(1, size - 1))] for e in range(size)]
            case "lower":
                return [[e] for e in range(size)]
        return [run[:1] for run in runs]

    def extra_loss(self) -> Tensor | None:
        """See `Compression.extra_loss`."""
        term = self._experts.balance() if self._balance else None
        return None if term is None else self._balance * term

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        if name == ROUTER:
            return self._width, self.size
        shape = super().part_shape(index, name)
        return (self.size, *shape) if name == "tied" and index in self.of_experts else shape
