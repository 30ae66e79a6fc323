"""What the sparse strategies have in common: budgets, rebuilding, and pruning before training."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.budget import Budget, Stored
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Strategy
from memfold.errors import InputError
from memfold.options import Count
from memfold.seeding import derive_seed
from memfold.strategies.pruning.densities import Distribution
from memfold.strategies.pruning.masks import (
    PackedMask,
    Ranking,
    Scope,
    schedule_counts,
    shuffle_mask,
)
from memfold.strategies.pruning.product_costs import Linear
from memfold.strategies.pruning.sparse_weights import SparseWeights
from memfold.strategies.pruning.stored_masks import costliest_counts, masks_of, stored_like

__all__ = [
    "NEEDS",
    "PruningAtInit",
    "SampledPruning",
    "Schedule",
    "Score",
    "SparseStrategy",
]

Schedule = Literal["exponential", "linear"]
Score = Callable[[Sequence[PackedMask]], list[Tensor]]
"""What is left of each weight, the rest being zero -> new scores of the weights' shapes."""
NEEDS = "one value and its index"
"""Of the smallest file, for a message."""


@dataclass(frozen=True, kw_only=True)
class SparseStrategy(Strategy):
    """Keep some of the weights and drop the others; `num_values` counts the kept ones."""

    trains_matrices: ClassVar[bool] = True
    draws_masks: ClassVar[bool] = False
    """Whether the masks follow from the seed and the number of values alone."""

    linear: Linear = "auto"
    """How linear layers and convolutions of size 1 multiply: `weight` builds it from the kept
    values, `kept` takes these alone, without gradients of others; `auto` takes what costs less."""

    def masks_from_seed(
        self, shapes: Mapping[str, torch.Size], num_values: int, device: torch.device
    ) -> Iterator[list[Tensor]]:
        """Draw the masks again, and then as earlier versions drew them.

        Only called when `draws_masks`.

        Args:
            shapes: Name of a weight -> its shape, and that of its mask.
            num_values: How many are kept.
            device: Of the masks.
        """
        raise NotImplementedError

    def sparse_weights(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        masks: Sequence[Tensor],
    ) -> SparseWeights:
        """Describe what is kept, before the weights are replaced."""
        sparse = SparseWeights(self, model, weights, masks, linear=self.linear)
        if self.draws_masks:
            shapes = dict(zip(sparse.names, sparse.shapes, strict=True))
            count, device = sparse.num_values, torch.device("cpu")
            sparse.draw = partial(self.masks_from_seed, shapes, count, device)
        return sparse

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> SparseWeights:
        """See `Strategy.rebuild`."""
        check_replaceable(model, weights)
        total = sum(weight.numel for weight in weights)
        if self.draws_masks and not 1 <= num_values <= total:
            raise InputError(f"{num_values} values cannot be kept of {total}")
        shapes, like = {weight.name: weight.shape for weight in weights}, weights[0].tensor
        if self.draws_masks:
            drawn = self.masks_from_seed(shapes, num_values, like.device)
        else:
            drawn = [masks_of(tensors, list(shapes.values()))]
        for masks in drawn:
            sparse = self.sparse_weights(model, weights, masks)
            if sparse.has_fingerprint(tensors):
                break
        if sparse.num_values != num_values:
            raise InputError(f"the artifact keeps {sparse.num_values} values, not {num_values}")
        sparse.attach({"values": [v.to(like) for v in sparse.split(tensors)]})
        return sparse

    def kept_count(
        self,
        model: nn.Module,
        weights: Sequence[CompressibleWeight],
        counts_for: Callable[[int], Sequence[int]],
        *,
        least: int = 1,
        needs: str = NEEDS,
        most: int | None = None,
    ) -> int:
        """Return how many weights to keep: what `ratio` says, or the most that fit the budget.

        Args:
            model: The dense model.
            weights: The compressible weights.
            counts_for: Total -> number of kept values of each weight; it decides what the index
                costs.
            least: The smallest total that a budget may end in.
            needs: What that is made of, for the error message.
            most: The largest; all weights when `None`.

        Raises:
            InputError: The budget is below what the least values and their index take.
        """
        if self.budget_bytes is None:
            return self.target_values(weights)
        shapes, dtype = [weight.shape for weight in weights], weights[0].tensor.dtype

        def choose(count: int) -> Stored:
            if self.draws_masks:
                return stored_like(count, None, shapes, dtype)
            # Scores may change: a single value fits wherever it will be.
            counts = counts_for(count) if count > 1 else costliest_counts(shapes)
            return stored_like(count, counts, shapes, dtype)

        most = sum(weight.numel for weight in weights) if most is None else most
        return Budget(self, model, weights).most(choose, least, most, needs)


@dataclass(frozen=True, kw_only=True)
class PruningAtInit(SparseStrategy):
    """Score the initial weights, keep those with the largest scores, train them."""

    unshardable: ClassVar[str | None] = None
    scope: Scope = "global"
    """Whether all weights compete (`global`), or those of one tensor (`layer`)."""
    densities: Distribution | None = None
    """Share of its weights that each tensor keeps, whatever the scope is: the same (`uniform`),
    Erdos-Renyi's without or with the kernel's size (`er`, `erk`); null leaves it to the scope."""
    rounds: Count = 1
    """Prune in so many steps, with new scores in each; weights are not trained in between."""
    schedule: Schedule = "exponential"
    """How the kept share falls over the rounds t of T: rho^(t/T), or linearly to rho."""
    shuffle: bool = False
    """Permute each tensor's mask at random: a sanity check (arXiv 2009.08576)."""
    reinitialise: bool = False
    """Permute each tensor's initial values at random after pruning: another draw of its own
    distribution, the second sanity check of the same paper."""

    @abstractmethod
    def scorer(
        self, model: nn.Module, weights: Sequence[CompressibleWeight], context: Context
    ) -> Score:
        """Return what scores the weights: the largest scores stay.

        Args:
            model: The dense model.
            weights: The weights to score.
            context: Data and loss.

        Raises:
            InputError: Data or loss are needed and missing.
        """

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> SparseWeights:
        """See `Strategy.build`."""
        check_replaceable(model, weights)
        masks = self._masks(model, weights, self.scorer(model, weights, context))
        masks = self._shuffled(masks, [weight.name for weight in weights])
        sparse = self.sparse_weights(model, weights, masks)
        sparse.keep(self._initial(weight) for weight in weights)
        return sparse

    def _initial(self, weight: CompressibleWeight) -> Tensor:
        """Return the values of which those that stay are trained."""
        values = weight.tensor.detach()
        if not self.reinitialise:
            return values
        generator = self._generator("reinitialise", weight.name)
        order = torch.randperm(weight.numel, generator=generator).to(values.device)
        return values.reshape(-1)[order].view(weight.shape)

    def _masks(
        self,
        model: nn.Module,
        weights: Sequence[CompressibleWeight],
        score: Score,
    ) -> list[Tensor]:
        total = remaining = sum(weight.numel for weight in weights)
        kept = [PackedMask(weight.shape, weight.tensor.device) for weight in weights]
        ratio = self.asked_ratio if self.budget_bytes is None else None
        for done in range(self.rounds):
            ranking = self._ranked(score, kept)
            # What the index costs depends on the scores: the last ones settle the budget. It may
            # cost more with fewer values, so the search ends at those that are left.
            count = self.kept_count(model, weights, ranking.counts, most=remaining)
            count = min(remaining, count)
            left = schedule_counts(total, count, self.rounds, self.schedule, ratio=ratio)[done]
            remaining = min(remaining, left)
            kept = ranking.masks(remaining)
            del ranking  # the next scores are made when these are gone
        return [mask.unpacked() for mask in kept]

    def _ranked(self, score: Score, kept: Sequence[PackedMask]) -> Ranking:
        scores = score(kept)
        for one, mask in zip(scores, kept, strict=True):
            mask.fill_others(one, -torch.inf)
        return Ranking(scores, scope=self.scope, densities=self.densities)

    def _shuffled(self, masks: list[Tensor], names: Sequence[str]) -> list[Tensor]:
        if not self.shuffle:
            return masks
        pairs = zip(masks, names, strict=True)
        return [shuffle_mask(mask, self._generator("shuffle", name)) for mask, name in pairs]

    def _generator(self, purpose: str, name: str) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(derive_seed(self.seed, purpose, name))


@dataclass(frozen=True, kw_only=True)
class SampledPruning(PruningAtInit):
    """Score the weights on some samples of the training set."""

    num_samples: Count = 1000
    """Samples that the scores look at: all there are when there are fewer."""
