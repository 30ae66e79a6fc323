"""GraSP: keep the weights whose removal would hurt the flow of gradients most.

Chaoqi Wang, Guodong Zhang and Roger Grosse, "Picking winning tickets before training by preserving
gradient flow", ICLR 2020, arXiv 2002.07376. The score is theta (H g): removing weight q changes the
squared gradient norm by -2 theta_q (H g)_q in first order. Gradient g and Hessian H are those of
the mean loss over `num_samples` samples, with logits divided by `temperature`, in training mode, as
in the authors' code: BatchNorm normalises by the statistics of each batch.

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts. What does not:
activations, operations. Scoring differentiates twice: two to three times the activations of a
training step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from memfold.compression.samples import take_samples
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.options import Positive
from memfold.seeding import derive_seed
from memfold.strategies.pruning.base import SampledPruning, Score
from memfold.strategies.pruning.masks import PackedMask
from memfold.strategies.pruning.scoring import grasp_scores

__all__ = ["GraSP"]


@dataclass(frozen=True, kw_only=True)
class GraSP(SampledPruning, name="grasp"):
    """The score is theta (H g), with its sign."""

    temperature: Positive = 200.0
    """The logits are divided by it while scoring."""
    absolute: bool = False
    """Keep the largest |theta (H g)| instead, which Frankle et al. 2021, arXiv 2009.08576, found to
    train better; the paper keeps the largest with their sign."""

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """See `PruningAtInit.scorer`."""
        samples, loss = take_samples(
            self.name, context.data, context.loss, num_samples=self.num_samples
        )
        parameters = {weight.name: weight.tensor for weight in weights}
        seed = derive_seed(self.seed, "scoring")

        def score(kept: Sequence[PackedMask]) -> list[Tensor]:
            temperature = self.temperature
            scores = grasp_scores(
                model, parameters, samples, loss, kept=kept, temperature=temperature, seed=seed
            )
            return [score.abs() for score in scores] if self.absolute else scores

        return score
