"""MAG: keep the weights with the largest magnitude |theta| at initialisation.

Among weights that are drawn independently this says nothing about the data: with `scope=global` it
ranks layers by the scale of their initial weights, and drops wide layers first.

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts. What does not:
activations, operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.strategies.pruning.base import PruningAtInit, Score
from memfold.strategies.pruning.masks import PackedMask
from memfold.strategies.pruning.scoring import check_scores

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(PruningAtInit, name="mag"):
    """The score is |theta|; more rounds give the same mask."""

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """See `PruningAtInit.scorer`."""
        del model, context

        def score(kept: Sequence[PackedMask]) -> list[Tensor]:
            del kept
            scores = [weight.tensor.detach().abs() for weight in weights]
            check_scores(self.name, {weight.name: weight.tensor for weight in weights}, scores)
            return scores

        return score
