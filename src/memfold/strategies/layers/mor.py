"""Mixture of recursions: the middle of a stack is looped, by each token as often as a router says.

Bae et al., "Mixture-of-recursions", NeurIPS 2025, arXiv 2507.10524.

    begin, middle, ..., middle, end       layers; the middle ones have the same weights
    x <- x + p F(x)                       for the tokens that loop F takes: see `recursions.py`

What shrinks: parameters, gradients, optimizer state, what DDP reduces; activations and operations
of the middle, by the tokens that leave it early.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from memfold.compression.part_values import PartValues
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.options import NonNegative, Positive, Ratio
from memfold.seeding import derive_seed
from memfold.strategies.layers.middle_loop import LoopedWeights, MiddleLoop
from memfold.strategies.layers.recursions import ROUTER, Recursions, Routing, check_causal
from memfold.strategies.layers.repeated import Layers

__all__ = ["MixtureOfRecursions", "MorWeights"]

_ROUTER_SCALE = 0.02
_GATE_SCALE = 0.1
_BALANCE = {"expert": 0.001, "token": 0.01}


@dataclass(frozen=True, kw_only=True)
class MixtureOfRecursions(MiddleLoop, name="mor"):
    """Loop the middle layers, not for all tokens; `ratio` says how many layers these are."""

    routing: Literal["expert", "token"] = "expert"
    """Whether each loop chooses its tokens, or each token its number of loops."""
    capacity: tuple[Ratio, ...] | None = None
    """Share of a sequence's tokens that each loop takes in training, with `routing=expert`; null
    stands for (N - i) / N, i = 0 ... N - 1."""
    gate: Literal["weighted", "none"] = "weighted"
    """Whether what a loop gives is multiplied by its gate, which trains the router, and added; or
    put in the place of what it took."""
    gate_scale: Positive = _GATE_SCALE
    """What the sigmoid of a gate is multiplied by, with `routing=expert` and `gate=weighted`."""
    balance: NonNegative | None = None
    """Weight of the router's own term of the loss, see `memfold.extra_loss`; null stands for 0.001
    with `routing=expert`, 0.01 with `token`."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: There is not one capacity for each loop, or a loop takes more than the one
                before; or tokens choose, who know no capacity; or there are no gates to scale, or
                nothing trains the router.
        """
        super().__post_init__()
        if self.routing == "token" and self.capacity is not None:
            raise InputError(
                f"compression.capacity={list(self.capacity)}: with compression.routing=token, "
                "tokens choose their loops, and loops have no capacity; leave it out"
            )
        if len(self.capacities) != self.loops or list(self.capacities) != sorted(
            self.capacities, reverse=True
        ):
            raise InputError(
                f"compression.capacity={list(self.capacities)}: one number for each of "
                f"{self.loops} loops is needed, none larger than the one before"
            )
        has_scale = self.routing == "expert" and self.gate == "weighted"
        if self.gate_scale != _GATE_SCALE and not has_scale:
            raise InputError(
                f"compression.gate_scale={self.gate_scale} is for compression.routing=expert with "
                "compression.gate=weighted; leave it out"
            )
        if self.gate == "none" and self.balance == 0:
            raise InputError(
                "compression.gate=none with compression.balance=0: nothing would train the router"
            )

    @property
    def capacities(self) -> tuple[float, ...]:
        """Return `capacity`, of every loop."""
        loops = self.loops
        shares = tuple((loops - number) / loops for number in range(loops))
        return shares if self.capacity is None else self.capacity

    def make(self, layers: Layers, size: int) -> "MorWeights":
        """See `LayerStrategy.make`."""
        return MorWeights(self, layers, size, (ROUTER,))

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Begin as the plain loop, with a random router."""
        parts = super().start(made, layers, context)
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, ROUTER))
        drawn = torch.randn(made.part_shape(made.computed[0], ROUTER), generator=generator)
        return {**parts, ROUTER: [(drawn * _ROUTER_SCALE).to(layers.weights[0].tensor.detach())]}


class MorWeights(LoopedWeights):
    """`<weight>_tied` at the first layer that uses it; the router on the root.

    See `LoopedWeights`.
    """

    def make_hooks(
        self, strategy: MiddleLoop, model: nn.Module, loops: list[list[nn.Module]], width: int
    ) -> Recursions:
        """See `LoopedWeights.make_hooks`."""
        assert isinstance(strategy, MixtureOfRecursions)
        check_causal([layer for layers in loops for layer in layers], self.stack.paths[0])
        self._shape = len(loops), width
        given = strategy.balance
        self._balance = _BALANCE[strategy.routing] if given is None else given
        scale = strategy.gate_scale if strategy.gate == "weighted" else None
        self._recursions = Recursions(
            model, loops, width, Routing(strategy.routing, strategy.capacities, scale)
        )
        return self._recursions

    def extra_loss(self) -> Tensor | None:
        """See `Compression.extra_loss`."""
        term = self._recursions.loss() if self._balance else None
        return None if term is None else self._balance * term

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        return self._shape if name == ROUTER else super().part_shape(index, name)
