"""Dynamic sparse training: the network starts sparse, and its connections move while it trains.

Every layer keeps its number of weights n_l over the whole training. At every `update_every`-th
optimizer step t, until `end` of the training, the k = floor(f_t n_l) kept weights nearest to zero
are dropped, and k places that are not kept grow. Just-dropped ones may grow again, with the value
they had; all others start at exactly 0, with a momentum of 0. What grows, and what else happens in
that step, is up to the method.

    f_t = fraction                                      decay = constant
    f_t = fraction / 2 (1 + cos(pi t / T_end))          decay = cosine, T_end = end * total steps

Of equal weights the first in index order stays, of equal growth scores the first one grows: all
ranks and a resumed run decide the same.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, floor, pi
from typing import Any, ClassVar, Literal
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memfold.compression.compressed_model import check_replaceable
from memfold.compression.optimizers import keeps_state_around
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.options import Count, Share
from memfold.seeding import derive_seed
from memfold.strategies.pruning.base import SparseStrategy
from memfold.strategies.pruning.densities import Distribution, layer_counts
from memfold.strategies.pruning.masks import keep_counts
from memfold.strategies.pruning.product_costs import Linear
from memfold.strategies.pruning.sparse_weights import SparseWeights

__all__ = ["Decay", "DynamicStrategy", "DynamicWeights"]

Decay = Literal["cosine", "constant"]

_DUE = "update_due"


@dataclass(frozen=True, kw_only=True)
class DynamicStrategy(SparseStrategy):
    """Train with random connections, and replace the weakest now and then."""

    density: Distribution = "erk"
    """Density of a layer: the same for all, or Erdos-Renyi without or with the kernel's size."""
    dense_first: bool = False
    """Keep the first tensor whole; the others then share the rest of the budget."""
    update_every: Count = 100
    """Optimizer steps from one update to the next."""
    fraction: Share = 0.3
    """Share of a layer's weights that an update replaces, at first; in [0, 1]."""
    decay: Decay = "cosine"
    """How that share falls: to 0 along a cosine, or not at all (`constant`)."""
    end: Share = 0.75
    """Part of the training after which nothing is replaced any more; in [0, 1]."""

    moves_weights: ClassVar[bool] = True
    watches_gradients: ClassVar[bool] = False
    """Whether growth needs the gradients of the dense weights."""
    skips_step: ClassVar[bool] = False
    """Whether the optimizer's step has no effect when connections are replaced."""

    @abstractmethod
    def growth_scores(self, sparse: "DynamicWeights", step: int) -> Iterable[Tensor] | None:
        """Score every entry of every weight, at least 0: those not kept with the largest grow.

        Args:
            sparse: The weights as they are now.
            step: Optimizer steps done so far.

        Returns:
            A tensor of each weight's shape; `None` when this step cannot tell, and the next one
            has to try again.
        """

    def fraction_at(self, step: int, total_steps: int) -> float:
        """Return f_t, the share of a layer's weights that an update in this step replaces."""
        end = self.end * total_steps
        if step >= end:
            return 0.0
        if self.decay == "constant":
            return self.fraction
        return self.fraction / 2 * (1 + cos(pi * step / end))

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> "DynamicWeights":
        """See `Strategy.build`."""
        del context
        check_replaceable(model, weights)
        shapes = [weight.shape for weight in weights]

        def counts_for(total: int) -> list[int]:
            return layer_counts(shapes, total, self.density, dense_first=self.dense_first)

        # A whole first layer and one weight in each other are the least that can be split.
        least: dict[str, Any] = {}
        if self.dense_first and len(shapes) > 1:
            first = shapes[0].numel()
            needs = (
                f"one value in each layer and the indices (compression.dense_first=true keeps the "
                f"{first} weights of the first)"
            )
            least = {"least": first + len(shapes) - 1, "needs": needs}
        count = self.kept_count(model, weights, counts_for, **least)
        counts = counts_for(count)
        masks = [self._draw_mask(w, n) for w, n in zip(weights, counts, strict=True)]
        sparse = self.sparse_weights(model, weights, masks)
        sparse.keep([weight.tensor for weight in weights])
        return sparse

    def sparse_weights(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        masks: Sequence[Tensor],
    ) -> "DynamicWeights":
        """See `SparseStrategy.sparse_weights`."""
        return DynamicWeights(self, model, weights, masks, linear=self.linear)

    def _draw_mask(self, weight: CompressibleWeight, count: int) -> Tensor:
        """Keep `count` entries at random, whatever the values are."""
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, "mask", weight.name))
        mask = torch.zeros(weight.numel, dtype=torch.bool)
        mask[torch.randperm(weight.numel, generator=generator)[:count]] = True
        return mask.view(weight.shape).to(weight.tensor.device)


class DynamicWeights(SparseWeights):
    """Sparse weights whose positions change between the backward pass and the optimizer's step."""

    root_names: ClassVar[tuple[str, ...]] = (*SparseWeights.root_names, _DUE)

    def __init__(
        self,
        strategy: DynamicStrategy,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        masks: Sequence[Tensor],
        *,
        linear: Linear,
    ) -> None:
        """See `SparseWeights`."""
        super().__init__(strategy, model, weights, masks, linear=linear)
        self.rules = strategy
        # Belongs to the coming optimizer step. An update that could not be made stays due, and a
        # checkpoint remembers it.
        self._due = False
        self._step: int | None = None
        self._has_moved = False

    def prepare_step(self, step: int, total_steps: int) -> None:
        """Watch the dense gradients if an update is due in this step and needs them."""
        self._set_due(self._is_due(step, total_steps))

    def before_step(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Replace connections if an update is due, once per step however often it is called.

        Raises:
            InputError: The optimizer keeps state that cannot follow, or is one whose step cannot
                be skipped.
        """
        super().before_step(optimizer, step, total_steps)
        last = self.rules.end * total_steps
        if step == 0 and self.rules.fraction > 0 and 0 < last <= self.rules.update_every:
            warn(
                f"{self.strategy.name} updates nothing in {total_steps} steps: "
                f"compression.update_every={self.rules.update_every} must be below "
                f"{last:g}, where the updates end",
                stacklevel=2,
            )
        is_again, self._step = step == self._step, step
        if not is_again:
            self._has_moved = False
            self._due = self._is_due(step, total_steps)
            scores = self.rules.growth_scores(self, step) if self._due else None
            if scores is not None:
                self._update(optimizer, scores, self._moves(step, total_steps))
        if self._has_moved and self.rules.skips_step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _update(self, optimizer: Optimizer, scores: Iterable[Tensor], moves: Sequence[int]) -> None:
        values = [self.values(index) for index in range(len(self.shapes))]
        if self.rules.skips_step and keeps_state_around(optimizer, values):
            raise InputError(
                f"{self.strategy.name} skips the optimizer's step where it moves weights, and "
                f"{type(optimizer).__name__} acts on them beside the optimizer that it wraps: "
                "take that one alone"
            )
        self.set_masks(self._updated(scores, moves), optimizer)
        self._due, self._has_moved = False, True

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: also whether the coming step has to update it."""
        return {**super().structure(), _DUE: torch.tensor(self._due)}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """See `Compression.adopt`.

        Raises:
            InputError: The structure is damaged, or of other weights.
        """
        due = structure.get(_DUE)
        if due is None or due.dtype != torch.bool or due.numel() != 1:
            raise InputError(f"{_DUE} must be one truth value")
        super().adopt(structure)
        self._step = None
        self._set_due(bool(due))

    def _set_due(self, due: bool) -> None:
        self._due = due
        if self.rules.watches_gradients:
            self.watch_gradients(due)

    def _is_due(self, step: int, total_steps: int) -> bool:
        on_schedule = step > 0 and step % self.rules.update_every == 0
        return (on_schedule or self._due) and any(self._moves(step, total_steps))

    def _moves(self, step: int, total_steps: int) -> list[int]:
        """Return how many weights of each layer are replaced; in a dense one nothing can be."""
        fraction = self.rules.fraction_at(step, total_steps)
        return [
            floor(fraction * count) if count < shape.numel() else 0
            for count, shape in zip(self.counts, self.shapes, strict=True)
        ]

    @torch.no_grad()
    def _updated(self, scores: Iterable[Tensor], moves: Sequence[int]) -> list[Tensor]:
        masks = self.masks()
        for index, (score, move) in enumerate(zip(scores, moves, strict=True)):
            if move == 0:
                continue
            size = self.values(index).abs()
            (stays,) = keep_counts([size], [len(size) - move])
            kept = torch.zeros_like(masks[index].view(-1))
            kept[self._positions_on(index, kept.device)[stays]] = True
            free = score.to(kept.device).reshape(-1).masked_fill(kept, -1)
            (grown,) = keep_counts([free], [move])
            masks[index] = (kept | grown).view(masks[index].shape)
        return masks
