"""Low rank: a weight matrix is the product of two thin ones, which are trained.

Mikhail Khodak, Neil Tenenholtz, Lester Mackey and Nicolo Fusi, "Initialization and regularization
of factorized neural layers", ICLR 2021, arXiv 2105.01029.

    W = U V^T                                  U: rows x r,  V: columns x r
    U = U_r sqrt(S_r),  V = V_r sqrt(S_r)      at first: the r largest singular values of W
    lambda / 2 |U V^T|_F^2                     in place of weight decay (Frobenius decay)

What shrinks: parameters, gradients, optimizer state, what DDP reduces. What does not: activations
and operations, because the dense weight is built for every pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from memfold.compression.accounting import tensor_bytes
from memfold.compression.budget import Budget, Stored, like
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.optimizers import optimizers_in
from memfold.compression.parametrised import Parametrised
from memfold.compression.part_values import PartValues
from memfold.compression.parts import Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Ratios, Strategy
from memfold.errors import InputError
from memfold.options import NonNegative
from memfold.seeding import derive_seed
from memfold.strategies.factoring.matrices import (
    WHOLE,
    Rule,
    allocate_ranks,
    frobenius_gradient,
    largest_rank,
    matrix_of,
    matrix_shape,
    num_values_at,
    spectral_factors,
    weight_of,
)

__all__ = ["LowRank", "LowRankWeights"]

_VALUES = "factor_values"
_RANKS = "factor_ranks"
_LATER = "_memfold_later"
_DECAYED = "_memfold_decayed_version"


@dataclass(frozen=True, kw_only=True)
class LowRank(Strategy, name="low_rank"):
    """Train the factors of every weight matrix, with ranks that use up the budget."""

    ratios: ClassVar[Ratios] = "steps"
    trains_matrices: ClassVar[bool] = True
    parametrised: ClassVar[Parametrised] = "stateless"
    ranks: Rule = "equal"
    """The same rank for all matrices, so that none is a bottleneck for the others, or one in
    proportion to the full rank, as in the paper (which leaves first and last layers dense)."""
    frobenius_decay: NonNegative | None = None
    """Strength lambda of the decay of U V^T, which then replaces the optimizer's decay of U and V;
    null takes over the optimizer's weight_decay, 0 leaves the decay of U and V to the optimizer."""

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> "LowRankWeights":
        """See `Strategy.build`."""
        del context
        check_replaceable(model, weights)
        low_rank = LowRankWeights(self, model, weights, self._ranks(model, weights))
        factors = [self._factors(weights[i], low_rank.ranks[i]) for i in low_rank.computed]
        low_rank.attach({"left": [u for u, _ in factors], "right": [v for _, v in factors]})
        return low_rank

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> "LowRankWeights":
        """See `Strategy.rebuild`."""
        check_replaceable(model, weights)
        low_rank = LowRankWeights(self, model, weights, _stored_ranks(tensors, weights))
        if low_rank.num_values != num_values:
            raise InputError(
                f"the artifact's {_RANKS} need {low_rank.num_values} values, it has {num_values}"
            )
        low_rank.accept(weights, tensors)
        return low_rank

    def _ranks(self, model: nn.Module, weights: Sequence[CompressibleWeight]) -> list[int]:
        shapes = [matrix_shape(weight.shape) for weight in weights]
        total = sum(weight.numel for weight in weights)
        least = sum(num_values_at(shape, min(1, largest_rank(shape))) for shape in shapes)
        if self.budget_bytes is not None:
            dtype = weights[0].tensor.dtype

            def choose(values: int) -> Stored:
                return _stored_like(shapes, allocate_ranks(shapes, values, self.ranks), dtype)

            needs = "one rank per tensor"
            values = Budget(self, model, weights).most(choose, least, total, needs)
            return allocate_ranks(shapes, values, self.ranks)
        values = self.target_values(weights)
        if values < least:
            raise InputError(
                f"ratio={self.asked_ratio:g}: low_rank needs at least {least} values, one rank per "
                f"tensor (ratio {ceil(least / total * 1e6) / 1e6:g})"
            )
        return allocate_ranks(shapes, values, self.ranks)

    def _factors(self, weight: CompressibleWeight, rank: int) -> tuple[Tensor, Tensor]:
        tensor = weight.tensor.detach()
        seed = derive_seed(self.seed, "low_rank", weight.name)
        generator = torch.Generator("cpu").manual_seed(seed)
        left, right = spectral_factors(matrix_of(tensor), rank, generator)
        return left.to(tensor), right.to(tensor)


class LowRankWeights(PartValues):
    """Products of parameters `<weight>_left` and `<weight>_right`, beside tensors left whole."""

    parts: Mapping[str, Level] = {"left": "weight", "right": "weight"}
    values_name: ClassVar[str] = _VALUES
    root_names: ClassVar[tuple[str, ...]] = (_VALUES, _RANKS)

    def __init__(
        self,
        strategy: LowRank,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        ranks: Sequence[int],
    ) -> None:
        """Take note of the ranks; `attach` then replaces the weights.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: All compressible weights.
            ranks: One per weight; `WHOLE` for those that stay dense parameters.

        Raises:
            InputError: The name of a factor is taken.
        """
        whole = [index for index, rank in enumerate(ranks) if rank == WHOLE]
        super().__init__(strategy, model, weights, whole=whole)
        self.ranks = list(ranks)
        self._decay = strategy.frobenius_decay

    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`, in the dtype of its factors."""
        left, right = self.part(index, "left"), self.part(index, "right")
        # As a dense parameter, it takes part in mixed precision where it is used.
        with torch.autocast(left.device.type, enabled=False):
            return weight_of(left @ right.T, self.shapes[index])

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        rows, columns = matrix_shape(self.shapes[index])
        return (rows if name == "left" else columns), self.ranks[index]

    @property
    def index_bytes(self) -> int:
        """The ranks, int32; nothing when every tensor is whole."""
        return tensor_bytes(self.index_tensors().values())

    @property
    def index_format(self) -> str:
        """See `Compression.index_format`."""
        return "ranks" if any(self.ranks) else "none"

    @property
    def resident_bytes(self) -> int:
        """Nothing: the shapes of the factors are their ranks."""
        return 0

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        return {_RANKS: torch.tensor(self.ranks, dtype=torch.int32)} if any(self.ranks) else {}

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Let the optimizer's step decay U V^T in place of U and V.

        What the optimizer is going to add to the gradient of U, weight_decay U, is subtracted
        there, and lambda U V^T V is added. An optimizer with decoupled decay (AdamW) will instead
        subtract lr weight_decay U from U itself; after its step, U is corrected by the difference
        to lr lambda U V^T V, with the factors that the gradients belong to. Factors without a
        gradient, which the optimizer skips, are left alone. Neither the optimizer's groups nor its
        state change, so that checkpoints are those of a plain training.
        """
        del step, total_steps
        if self._decay == 0:
            return
        # The innermost comes last, and is the one that takes the steps.
        steps = {
            id(p): (one, group)
            for one in optimizers_in(optimizer)
            for group in one.param_groups
            for p in group["params"]
        }
        for pair in self.pairs():
            for factor, other in (pair, pair[::-1]):
                one, group = steps.get(id(factor), (None, {}))
                if one is None:
                    continue
                # Of a step that was skipped (mixed precision, gradients not finite).
                vars(one).get(_LATER, {}).pop(factor, None)
                gradient = factor.grad
                if gradient is None or vars(gradient).get(_DECAYED) == gradient._version:
                    continue
                removed = group.get("weight_decay", 0)
                added = removed if self._decay is None else self._decay
                wide = torch.promote_types(factor.dtype, torch.float32)
                decay = frobenius_gradient(factor.to(wide), other.to(wide))
                change = added * decay - removed * factor
                if _is_decoupled(one, group):
                    _add_later(one, factor, change * -group["lr"])
                else:
                    gradient.add_(change)
                    # Once for these gradients, however often this is called.
                    vars(gradient)[_DECAYED] = gradient._version

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield U (rows, r) and V (columns, r) of each weight that is not whole."""
        for index in self.computed:
            yield self.part(index, "left"), self.part(index, "right")


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the decay of a group acts on the parameters themselves, beside the gradient."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))


def _add_later(optimizer: Optimizer, factor: Tensor, change: Tensor) -> None:
    """Add `change` to a factor at the end of the optimizer's next step."""
    # Neither this nor hooks are in an optimizer's state dict, its copies or its pickles.
    if _LATER not in vars(optimizer):
        vars(optimizer)[_LATER] = {}
        optimizer.register_step_post_hook(_add_now)
    vars(optimizer)[_LATER][factor] = change


@torch.no_grad()
def _add_now(optimizer: Optimizer, *_: object) -> None:
    changes: dict[Tensor, Tensor] = vars(optimizer)[_LATER]
    for factor, change in changes.items():
        factor.add_(change)
    changes.clear()


def _stored_like(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype
) -> Stored:
    """Describe what is stored at these ranks."""
    num_values = sum(map(num_values_at, shapes, ranks))
    indices = {_RANKS: like([len(ranks)], torch.int32)} if any(ranks) else {}
    return Stored(num_values, {_VALUES: like([num_values], dtype)}, indices)


def _stored_ranks(
    tensors: Mapping[str, Tensor], weights: Sequence[CompressibleWeight]
) -> list[int]:
    """Read an artifact's ranks; without them, every tensor is whole."""
    ranks = tensors.get(_RANKS)
    if ranks is None:
        return [WHOLE] * len(weights)
    if ranks.dtype != torch.int32 or ranks.shape != (len(weights),):
        raise InputError(f"the artifact's {_RANKS} must be {len(weights)} int32 numbers")
    for weight, rank in zip(weights, ranks.tolist(), strict=True):
        largest = largest_rank(matrix_shape(weight.shape))
        if not 0 <= rank <= largest:
            raise InputError(f"{weight.name}: rank {rank} in the artifact is not in 0..{largest}")
    return ranks.tolist()
