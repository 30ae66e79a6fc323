"""SNIP: keep the weights whose removal would change the loss most.

Namhoon Lee, Thalaiyasingam Ajanthan and Philip H. S. Torr, "SNIP: single-shot network pruning based
on connection sensitivity", ICLR 2019, arXiv 1810.02340. The score is |dL(c theta) / dc| at c = 1,
which is |g theta|; g is the gradient of the mean loss over `num_samples` samples, in evaluation
mode, as in the authors' code.

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts. What does not:
activations, operations. Scoring needs one dense gradient and a copy of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from memfold.compression.samples import take_samples
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.seeding import derive_seed
from memfold.strategies.pruning.base import SampledPruning, Score
from memfold.strategies.pruning.scoring import snip_scores

__all__ = ["SNIP"]


@dataclass(frozen=True, kw_only=True)
class SNIP(SampledPruning, name="snip"):
    """The score is |g theta|."""

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """See `PruningAtInit.scorer`."""
        samples, loss = take_samples(
            self.name, context.data, context.loss, num_samples=self.num_samples
        )
        parameters = {weight.name: weight.tensor for weight in weights}
        seed = derive_seed(self.seed, "scoring")
        return lambda kept: snip_scores(model, parameters, samples, loss, kept=kept, seed=seed)
