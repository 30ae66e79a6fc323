"""RigL: grow where the gradient of the dense weights is largest.

Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro and Erich Elsen, "Rigging the lottery:
making all tickets winners", ICML 2020, arXiv 1911.11134. An update drops the k kept weights
nearest to zero in every layer and grows the k others with the largest |dL / dw|; the optimizer's
step has no effect in that iteration. See `dynamic.py` for the schedule.

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: operations;
in an update step the gradient of every dense weight is in memory at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, distributed

from memfold.strategies.pruning.dynamic import DynamicStrategy, DynamicWeights

__all__ = ["RigL"]


@dataclass(frozen=True, kw_only=True)
class RigL(DynamicStrategy, name="rigl"):
    """Drop the weights nearest to zero, grow those with the largest dense gradient."""

    watches_gradients: ClassVar[bool] = True
    skips_step: ClassVar[bool] = True

    def growth_scores(self, sparse: DynamicWeights, step: int) -> Iterator[Tensor] | None:
        """Return |dL / dw|, summed over micro-batches and ranks.

        `None` when it was not watched (the loop has just begun), or is not finite (mixed precision
        scaled the loss too much).
        """
        del step
        gradients = sparse.dense_gradients()
        if gradients is None:
            return None
        gradients = [gradient.contiguous() for gradient in gradients]
        if distributed.is_available() and distributed.is_initialized():
            for gradient in gradients:
                distributed.all_reduce(gradient)
        # After the sum, so that all ranks agree.
        if not all(gradient.isfinite().all() for gradient in gradients):
            return None
        return (gradient.abs() for gradient in gradients)
