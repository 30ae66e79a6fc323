"""RAND: keep a random choice of the weights.

The control of every pruning method: with `scope=global` each set of weights of the right size is
equally likely, so a layer keeps about its share (a hypergeometric number of weights).

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts, which need no
index: the seed draws the mask again. What does not: activations, operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memfold.seeding import derive_seed
from memfold.strategies.base import Context
from memfold.strategies.pruning.base import PruningAtInit
from memfold.strategies.pruning.masks import keep_largest, shuffle_mask
from memfold.strategies.selection import CompressibleWeight

__all__ = ["Rand"]


@dataclass(frozen=True, kw_only=True)
class Rand(PruningAtInit, name="rand"):
    """Random scores, from the seed and the tensors' names. More rounds give the same mask."""

    @property
    def is_drawn_from_seed(self) -> bool:
        """See `SparseStrategy.is_drawn_from_seed`."""
        return True

    def masks_from_seed(
        self, weights: Sequence[CompressibleWeight], num_values: int
    ) -> list[Tensor]:
        """See `SparseStrategy.masks_from_seed`."""
        masks = keep_largest(self._scores(weights), num_values, scope=self.scope)
        if self.shuffle:
            pairs = zip(masks, weights, strict=True)
            masks = [shuffle_mask(m, self._generator("shuffle", weight)) for m, weight in pairs]
        return masks

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Callable[[], list[Tensor]]:
        """See `PruningAtInit.scorer`."""
        del model, context
        return lambda: self._scores(weights)

    def _scores(self, weights: Sequence[CompressibleWeight]) -> list[Tensor]:
        """Draw float64 numbers on the CPU: 53 random bits make ties unlikely in any model."""
        scores = []
        for weight in weights:
            seed = derive_seed(self.seed, "rand", weight.name)
            generator = torch.Generator("cpu").manual_seed(seed)
            draw = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
            scores.append(draw.to(weight.tensor.device))
        return scores
