"""Hyperloop: the middle of a stack is looped, around which the residual stream has copies.

Zeitoun, Torroba-Hennigen and Kim, "Hyperloop transformers", 2026, arXiv 2604.21254.

    begin, middle, ..., middle, end           layers; the middle ones have the same weights
    y <- H_res y + H_post (F(H_pre y) + e)    after each loop F of the middle: see
                                              `hyper_connections.py`

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations,
which become a little more, and operations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memfold.compression.part_values import PartValues
from memfold.compression.strategy import Context
from memfold.options import Count
from memfold.strategies.layers.hyper_connections import BIASES, GATES, VECTORS, HyperConnections
from memfold.strategies.layers.middle_loop import LoopedWeights, MiddleLoop
from memfold.strategies.layers.repeated import Layers

__all__ = ["Hyperloop", "HyperloopWeights"]

_PARTS = (GATES, BIASES, VECTORS)


@dataclass(frozen=True, kw_only=True)
class Hyperloop(MiddleLoop, name="hyperloop"):
    """Loop the middle layers; `ratio` says how many these are."""

    copies: Count = 4
    """Of the residual stream."""

    def make(self, layers: Layers, size: int) -> "HyperloopWeights":
        """See `LayerStrategy.make`."""
        return HyperloopWeights(self, layers, size, _PARTS)

    def start(
        self, made: PartValues, layers: Layers, context: Context
    ) -> Mapping[str, list[Tensor]]:
        """Begin as the plain loop, nearly: copies that keep nothing would stay the same for ever.

        Their share H_res of themselves, each its own, is what tells them apart.
        """
        parts = super().start(made, layers, context)
        like, first = layers.weights[0].tensor.detach(), made.computed[0]
        new = {name: like.new_zeros(*made.part_shape(first, name)) for name in _PARTS}
        new[BIASES][:, 2 * self.copies :] = torch.linspace(-2, 2, self.copies)
        return {**parts, **{name: [tensor] for name, tensor in new.items()}}


class HyperloopWeights(LoopedWeights):
    """`<weight>_tied` at the first layer that uses it; gates and vectors of the loops on the root.

    See `LoopedWeights`.
    """

    def make_hooks(
        self, strategy: MiddleLoop, model: nn.Module, loops: list[list[nn.Module]], width: int
    ) -> HyperConnections:
        """See `LoopedWeights.make_hooks`; take note of the sizes of parts."""
        assert isinstance(strategy, Hyperloop)
        rows = 3 * strategy.copies
        self._shapes = {
            GATES: (len(loops), rows, strategy.copies * width),
            BIASES: (len(loops), rows),
            VECTORS: (len(loops), width),
        }
        return HyperConnections(model, loops, width, strategy.copies)

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        return self._shapes.get(name) or super().part_shape(index, name)
