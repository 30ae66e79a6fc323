"""Hyperloop: the middle of a stack is looped, around which the residual stream has copies.

Zeitoun, Torroba-Hennigen and Kim, "Hyperloop transformers", 2026, arXiv 2604.21254.

    begin, middle, ..., middle, end           layers; the middle ones have the same weights
    y <- H_res y + H_post (F(H_pre y) + e)    after each loop F of the middle: see
                                              `hyper_connections.py`

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations,
which become a little more, and operations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.options import Count, Interval
from memfold.strategies.layers.hyper_connections import BIASES, GATES, VECTORS, HyperConnections
from memfold.strategies.layers.repeated import Stack
from memfold.strategies.layers.tied import TiedWeights, TyingStrategy

__all__ = ["Hyperloop", "HyperloopWeights"]


@dataclass(frozen=True, kw_only=True)
class Hyperloop(TyingStrategy, name="hyperloop"):
    """Loop the middle layers; `ratio` says how many these are."""

    default_ratio: ClassVar[float] = 0.5
    """A quarter of the layers' weights begins, half is looped, a quarter ends."""

    loops: Annotated[int, Interval("[2, inf)")] = 3
    """Passes through the middle."""
    copies: Count = 4
    """Of the residual stream."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many layers the middle may have."""
        inner = len(stack) - 2
        if inner < self.loops:
            works = "2 works" if inner == 2 else f"2 to {inner} work"
            remedy = works if inner > 1 else "4 layers or more are needed"
            raise InputError(
                f"compression.loops={self.loops}: of {len(stack)} repeated layers the first and "
                f"the last stay out of the loop; {remedy}"
            )
        return range(inner // self.loops, 0, -1)

    def make(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        size: int,
    ) -> "HyperloopWeights":
        """See `LayerStrategy.make`."""
        return HyperloopWeights(self, model, weights, stack, size)

    def start(
        self,
        made: PartValues,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        context: Context,
    ) -> Mapping[str, list[Tensor]]:
        """Begin as the plain loop, nearly: copies that keep nothing would stay the same for ever.

        Their share H_res of themselves, each its own, is what tells them apart.
        """
        parts = super().start(made, weights, stack, context)
        like, first = weights[0].tensor.detach(), made.computed[0]
        new = {n: like.new_zeros(*made.part_shape(first, n)) for n in (GATES, BIASES, VECTORS)}
        new[BIASES][:, 2 * self.copies :] = torch.linspace(-2, 2, self.copies)
        return {**parts, **{name: [tensor] for name, tensor in new.items()}}


class HyperloopWeights(TiedWeights):
    """`<weight>_tied` at the first layer that uses it; gates and vectors of the loops on the root.

    The densified model keeps these and the hooks: there is no plain one with the same function.
    """

    def __init__(
        self,
        strategy: Hyperloop,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        stack: Stack,
        size: int,
    ) -> None:
        """Take note of the layers, and of how many are in the middle."""
        looped = strategy.loops * size
        begin = (len(stack) - looped) // 2
        end = range(begin + size, len(stack) - looped + size)
        entries = (*range(begin), *(begin + i % size for i in range(looped)), *end)
        more: dict[str, Level] = {GATES: "model", BIASES: "model", VECTORS: "model"}
        super().__init__(strategy, model, weights, stack, entries, more)
        layers = [model.get_submodule(path) for path in stack.paths]
        firsts = range(begin, begin + looped, size)
        self._connections = HyperConnections(
            model,
            [(layers[first], layers[first + size - 1]) for first in firsts],
            _width(layers[0], stack.paths[0]),
            strategy.copies,
        )

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`."""
        super().attach(parts)
        self._connections.connect()

    def restore_dense(self) -> None:
        """See `Compression.restore_dense`; what loops need stays."""
        kept = {name: getattr(self.model, name) for name in (GATES, BIASES, VECTORS)}
        super().restore_dense()
        for name, parameter in kept.items():
            self.model.register_parameter(name, parameter)

    def current_weight(self, index: int) -> Tensor:
        """See `ComputedWeights.current_weight`: no weight depends on the gates."""
        return self.weight(index)

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        loops, width = len(self._connections.loops), self._connections.width
        rows = 3 * self._connections.copies
        shapes = {
            GATES: (loops, rows, self._connections.copies * width),
            BIASES: (loops, rows),
            VECTORS: (loops, width),
        }
        return shapes[name] if name in shapes else super().part_shape(index, name)


def _width(layer: nn.Module, path: str) -> int:
    """Return the size that all matrices of a layer have in common.

    Raises:
        InputError: There is none, or there are several.
    """
    shapes = [set(tensor.shape) for tensor in layer.parameters() if tensor.dim() == 2]
    common = set.intersection(*shapes) if shapes else set()
    if len(common) != 1:
        sizes = ", ".join(map(str, sorted(common))) or "no size"
        raise InputError(
            f"hyperloop: the residual stream of {path} cannot be told from its matrices, which "
            f"have {sizes} in common; one is needed"
        )
    (width,) = common
    return width
