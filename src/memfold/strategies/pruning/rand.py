"""RAND: keep a random choice of the weights.

The control of every pruning method: with `scope=global` each set of weights of the right size is
equally likely, so a layer keeps about its share (a hypergeometric number of weights); with
`densities` each layer keeps its own (`densities.py`).

What shrinks: parameters, gradients, optimizer state, what DDP reduces, artifacts, which need no
index: the seed draws the mask again. What does not: activations, operations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.seeding import derive_seed
from memfold.strategies.pruning.base import PruningAtInit, Score
from memfold.strategies.pruning.masks import former_shares, keep_counts, keep_largest

__all__ = ["Rand"]


@dataclass(frozen=True, kw_only=True)
class Rand(PruningAtInit, name="rand"):
    """Random scores, from the seed and the tensors' names. More rounds give the same mask."""

    draws_masks: ClassVar[bool] = True

    def masks_from_seed(
        self, shapes: Mapping[str, torch.Size], num_values: int, device: torch.device
    ) -> Iterator[list[Tensor]]:
        """See `SparseStrategy.masks_from_seed`."""
        scores, names = self._scores(shapes, device), list(shapes)
        masks = keep_largest(scores, num_values, scope=self.scope, densities=self.densities)
        yield self._shuffled(masks, names)
        if self.scope == "layer" and self.densities is None:
            counts = former_shares([shape.numel() for shape in shapes.values()], num_values)
            yield self._shuffled(keep_counts(scores, counts), names)

    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """See `PruningAtInit.scorer`."""
        del model, context
        shapes = {weight.name: weight.shape for weight in weights}
        return lambda _: self._scores(shapes, weights[0].tensor.device)

    def _scores(self, shapes: Mapping[str, torch.Size], device: torch.device) -> list[Tensor]:
        """Draw float64 numbers on the CPU: 53 random bits make ties unlikely in any model."""
        scores = []
        for name, shape in shapes.items():
            generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, "rand", name))
            scores.append(torch.rand(shape, generator=generator, dtype=torch.float64).to(device))
        return scores
