"""SET: grow anywhere, at random.

Decebal Constantin Mocanu, Elena Mocanu, Peter Stone, Phuong H. Nguyen, Madeleine Gibescu and
Antonio Liotta, "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 2018, arXiv 1707.04780. An update drops the k
kept weights nearest to zero in every layer and grows k others, each with the same chance. See
`dynamic.py` for the schedule.

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memfold.seeding import derive_seed
from memfold.strategies.pruning.dynamic import DynamicStrategy, DynamicWeights

__all__ = ["SET"]


@dataclass(frozen=True, kw_only=True)
class SET(DynamicStrategy, name="set"):
    """Drop the weights nearest to zero, grow as many at random."""

    def growth_scores(self, sparse: DynamicWeights, step: int) -> Iterator[Tensor]:
        """Return a random order of each weight's entries, from the seed, its name and the step."""
        for name, shape in zip(sparse.names, sparse.shapes, strict=True):
            seed = derive_seed(self.seed, "grow", name, step)
            generator = torch.Generator("cpu").manual_seed(seed)
            yield torch.randperm(shape.numel(), generator=generator).view(shape)
