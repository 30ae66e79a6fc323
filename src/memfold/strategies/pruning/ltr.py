"""Lottery-ticket rewinding: train, prune the smallest weights, rewind the others, train again.

Frankle and Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); Frankle, Dziugaite, Roy and
Carbin, "Stabilizing the Lottery Ticket Hypothesis" (arXiv 1912.05671). W_k are the weights after
k optimizer steps. Every round trains m * W_k from step k to the end, T; then, of the n weights that
the mask m keeps, the floor(f n) with the smallest |W_T| in the whole model leave it. The last round
has exactly as many as `ratio` or `budget_bytes` allow.

What shrinks: stored values, and from round to round parameters, gradients and optimizer state. What
does not: the first round trains the dense model, activations, operations but in linear layers that
have become sparse. The training costs as many runs as there are rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import floor
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memfold.compression.budget import Budget, Stored
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.rounds import Begin, Rounds
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.options import Count, Interval, Natural
from memfold.strategies.pruning.base import NEEDS, SparseStrategy
from memfold.strategies.pruning.masks import Ranking, keep_largest
from memfold.strategies.pruning.sparse_weights import SparseWeights
from memfold.strategies.pruning.stored_masks import stored_like

__all__ = ["LotteryTicket", "Ticket", "round_counts"]

_PERCENT_BEFORE_REWIND = 3


class Ticket(SparseWeights, Rounds):
    """Sparse weights that lose some of their number from round to round."""

    def __init__(
        self,
        strategy: "LotteryTicket",
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        counts: Sequence[int],
    ) -> None:
        """Plan the rounds; `keep` then replaces the weights.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: The weights to replace.
            counts: Number of weights in each round.
        """
        everything = [torch.ones_like(weight.tensor, dtype=torch.bool) for weight in weights]
        super().__init__(strategy, model, weights, everything, linear=strategy.linear)
        self.options = strategy
        self.round_counts = list(counts)
        has_budget = strategy.budget_bytes is not None
        self._budget = Budget(strategy, model, weights) if has_budget else None

    @property
    def num_rounds(self) -> int:
        """See `Rounds.num_rounds`."""
        return len(self.round_counts)

    def rewind_step(self, total_steps: int) -> int:
        """See `Rounds.rewind_step`."""
        step = self.options.rewind_steps
        if step is None:
            return total_steps * _PERCENT_BEFORE_REWIND // 100
        if step >= total_steps:
            raise InputError(
                f"compression.rewind_steps={step} must be below {total_steps}, the optimizer steps "
                "of one round"
            )
        return step

    def next_round(self, number: int) -> Begin:
        """Keep the largest of the weights that are left; see `Rounds.next_round`."""
        scores = self._magnitudes()
        count = min(self.round_counts[number], self.num_values)
        if self._budget is not None and number == self.num_rounds - 1:
            count = self._most_in_budget(scores, self._budget)
        return partial(self._begin, keep_largest(scores, count))

    def _begin(self, masks: Sequence[Tensor], optimizer: Optimizer | None) -> None:
        self.set_masks(masks, optimizer)

    @torch.no_grad()
    def _magnitudes(self) -> list[Tensor]:
        """Return |W|, and less than any of them where a weight is gone."""
        return [
            self.weight(index).abs().masked_fill(~mask, -torch.inf)
            for index, mask in enumerate(self.masks())
        ]

    def _most_in_budget(self, scores: Sequence[Tensor], budget: Budget) -> int:
        """Return how many of the weights that are left fit the budget, with their index."""
        ranking = Ranking(scores)

        def choose(count: int) -> Stored:
            return stored_like(count, ranking.counts(count), self.shapes, self.dtype)

        return budget.most(choose, 1, self.num_values, NEEDS)


@dataclass(frozen=True, kw_only=True)
class LotteryTicket(SparseStrategy, name="ltr"):
    """Train in rounds, each with fewer weights, all from the same early point of the training."""

    fraction: Annotated[float, Interval("[0, 1)")] = 0.2
    """Share of the remaining weights that leaves after a round, in [0, 1)."""
    rewind_steps: Natural | None = None
    """Optimizer steps before the point that rounds start from; 3 % of a round when `None`."""
    rounds: Count | None = None
    """How many there are, the first, dense one included; as many as `fraction` needs when `None`.
    Fewer: the last pruning takes more. More: the last ones train the same weights again."""

    moves_weights: ClassVar[bool] = True

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> Ticket:
        """See `Strategy.build`."""
        del context
        check_replaceable(model, weights)
        tensors = [weight.tensor.detach() for weight in weights]
        ranking = Ranking([tensor.abs() for tensor in tensors])
        # With a budget an estimate: what the index costs in the end, the trained weights decide.
        target = self.kept_count(model, weights, ranking.counts)
        total = sum(weight.numel for weight in weights)
        counts = round_counts(total, target, fraction=self.fraction, rounds=self.rounds)
        ticket = Ticket(self, model, weights, counts)
        ticket.keep(tensors)
        return ticket


def round_counts(
    total: int, target: int, *, fraction: float, rounds: int | None = None
) -> list[int]:
    """Return the number of weights in each round: n, n - floor(f n), ..., `target`.

    A round prunes at least one weight, unless f is 0 or the target is reached.

    Args:
        total: Number of weights in round 0.
        target: Number of weights in the last round.
        fraction: f, in [0, 1).
        rounds: Length of the result; `None`: as many rounds as it takes.

    Raises:
        InputError: The target cannot be reached like this.
    """
    if target < total and rounds == 1:
        raise InputError(
            "compression.rounds=1 trains the dense model alone; it must be at least 2 to prune"
        )
    if target < total and fraction == 0 and rounds is None:
        raise InputError(
            "compression.fraction=0 never prunes: set compression.rounds, or a larger fraction"
        )
    share = Fraction(str(fraction))  # 0.29 of 100 is 29, which its float is not
    counts = [total]
    while len(counts) != rounds and (rounds is not None or counts[-1] > target):
        pruned = max(floor(share * counts[-1]), int(fraction > 0))
        counts.append(max(target, counts[-1] - pruned))
    return [*counts[:-1], target]
