"""SynFlow: keep the weights through which most flows, without a look at data.

Hidenori Tanaka, Daniel Kunin, Daniel L. K. Yamins and Surya Ganguli, "Pruning neural networks
without any data by iteratively conserving synaptic flow", NeurIPS 2020, arXiv 2006.05467. The
score is |theta dR/dtheta| with R = sum of f(1; |theta|), in float64. The scores of every layer sum
to R, so the weights of a large layer have small ones; but as it loses weights, those that are left
score higher, and with 100 rounds no layer loses all of them.

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts. What does not:
activations, operations. Scoring needs one forward and backward pass of one sample per round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from memfold.compression.samples import first_input
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.options import Count
from memfold.strategies.pruning.base import PruningAtInit, Score
from memfold.strategies.pruning.scoring import synflow_scores

__all__ = ["SynFlow"]


@dataclass(frozen=True, kw_only=True)
class SynFlow(PruningAtInit, name="synflow"):
    """The score is |theta dR/dtheta|; of the data only the shape of an input is used."""

    rounds: Count = 100
    """Prune in so many steps, with new scores in each; weights are not trained in between."""

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """See `PruningAtInit.scorer`."""
        example = first_input(self.name, context.data)
        parameters = {weight.name: weight.tensor for weight in weights}
        return lambda kept: synflow_scores(model, parameters, example, kept)
