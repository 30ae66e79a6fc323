"""Tied layers, all of whose weights then share one vector: `tied`, and STABLE-RPS on what is left.

Lan et al., "ALBERT", ICLR 2020, arXiv 1909.11942; Desai and Shrivastava, "In defense of parameter
sharing for model-compression", ICLR 2024, arXiv 2310.11611.

    theta_i = g_i (lambda / nu_b) phi_b,   b = h(place of i)

Layers that are tied lie in the same place of the flattened model, which RANDOMFOLD then folds: they
are one tensor with one lambda, and a slot that holds one of its weights has the load of all layers
that use it. So the gradient's scale knows both kinds of sharing. With as many values as tied layers
have weights, it is `tied`; with layers of their own, `stable_rps`. What shrinks: parameters,
gradients, optimizer state, what DDP reduces. What does not: activations.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memfold.compression.selection import CompressibleWeight
from memfold.options import Count
from memfold.strategies.layers.maps import Entries, LayerMap, looped_map
from memfold.strategies.layers.repeated import stack_of
from memfold.strategies.sharing.mapping import Span, spans_of
from memfold.strategies.sharing.stable_rps import StableRPS

__all__ = ["TiedRPS"]


@dataclass(frozen=True, kw_only=True)
class TiedRPS(StableRPS, name="tied_rps"):
    """One vector for a model whose repeated layers share their weights, in the order of a map."""

    initialises: ClassVar[bool] = False

    map: LayerMap | Entries = "cycle"
    """Whose weights each position uses: a rule, or a list with one entry for each position:
    `[0,1,1,2]`."""
    loops: Count = 2
    """Layers that share one weight, where `map` is a rule."""
    layers: str | None = None
    """Glob of the paths of the repeated layers; null finds the longest list of equal ones."""

    def spans(self, model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> tuple[Span, ...]:
        """See `SharingStrategy.spans`: layers with the same entry of the map lie in one place."""
        stack = stack_of(model, weights, self.layers)
        entries = looped_map(self.map, len(stack), self.loops)
        firsts = {
            index: numbers[entries.index(entry)]
            for numbers in stack.weights.values()
            for index, entry in zip(numbers, entries, strict=True)
        }
        return spans_of(weights, firsts)
