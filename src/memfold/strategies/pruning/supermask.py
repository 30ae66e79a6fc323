"""Supermask: random weights that are never trained; what is learned is which of them to keep.

Vivek Ramanujan, Mitchell Wortsman, Aniruddha Kembhavi, Ali Farhadi and Mohammad Rastegari, "What's
hidden in a randomly weighted neural network?", CVPR 2020, arXiv 1911.13299 (edge-popup). Every
weight has a score s, and the network computes with

    w_eff = w h(|s|),    h = 1 for the k_l N_l largest |s| of its tensor, else 0
    w = +-sigma_l,       sigma_l = gain / sqrt(k_l fan_in)        signs from the seed, all the same
    dL/ds = w sign(s) dL/dw_eff                                   straight through h

What shrinks: the artifact, to one bit per weight or less. What does not: training, where every
weight has a score, its gradient, its optimizer state, and a byte for its sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.accounting import tensor_bytes
from memfold.compression.budget import Budget, Stored, like
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.fingerprints import fingerprint, is_fingerprint
from memfold.compression.parts import ComputedWeights, Level
from memfold.compression.selection import CompressibleWeight, padding_row_of
from memfold.compression.state import Logged
from memfold.compression.strategy import Context, Strategy
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.options import Positive, Ratio
from memfold.seeding import derive_seed
from memfold.strategies.pruning.health import metrics_of
from memfold.strategies.pruning.stored_masks import (
    CODED,
    COUNTS,
    FINGERPRINT,
    FINGERPRINT_BYTES,
    INDEX,
    index_bytes,
    index_format,
    masks_of,
    pack,
    packed_like,
)

__all__ = ["Supermask", "SupermaskWeights"]

PUBLISHED_RATIO = 0.5
"""The share that the paper keeps on CIFAR-10; there are more masks of it than of any other."""


@dataclass(frozen=True, kw_only=True)
class Supermask(Strategy, name="supermask"):
    """Keep the same share of every tensor's random weights. No value is stored, only the masks."""

    ratio: Ratio | None = None
    """Kept weights over compressible weights, in (0, 1]; 0.5 when no budget is given. A budget
    keeps as many as its index allows, up to 0.5."""
    default_ratio: ClassVar[float] = PUBLISHED_RATIO
    gain: Positive = 1.4142135623730951
    """Of sigma_l; the square root of 2 is for ReLU, 1 for a linear layer."""

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> "SupermaskWeights":
        """See `Strategy.build`."""
        check_replaceable(model, weights)
        report_loss(weights, context, "supermask keeps none of their values, and draws new ones")
        kept = _counts(weights, self._share(model, weights))
        supermask = SupermaskWeights(self, model, weights, kept)
        supermask.attach({"scores": [self._initial_scores(weight) for weight in weights]})
        return supermask

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> "SupermaskWeights":
        """See `Strategy.rebuild`; the scores become 1 for what is kept and 0 for the rest."""
        check_replaceable(model, weights)
        masks = masks_of(tensors, [weight.shape for weight in weights])
        kept = [int(mask.sum()) for mask in masks]
        if sum(kept) != num_values or min(kept) < 1:
            raise InputError(f"the artifact keeps {kept} weights, {num_values} in all are expected")
        supermask = SupermaskWeights(self, model, weights, kept)
        supermask.check_fingerprint(tensors)
        like = weights[0].tensor.detach()
        supermask.attach({"scores": [mask.to(like) for mask in masks]})
        return supermask

    def _share(self, model: nn.Module, weights: Sequence[CompressibleWeight]) -> float:
        """Return k, the same for all tensors: each keeps round(k N_l) weights, at least one."""
        if self.budget_bytes is None:
            return self.asked_ratio
        shapes, total = [weight.shape for weight in weights], sum(w.numel for w in weights)

        def share(steps: int) -> float:
            return PUBLISHED_RATIO * steps / total

        def choose(steps: int) -> Stored:
            counts = _counts(weights, share(steps))
            indices = packed_like(counts, shapes) | {FINGERPRINT: like([], torch.int64)}
            return Stored(sum(counts), {}, indices)

        needs = "one kept weight per tensor"
        return share(Budget(self, model, weights).most(choose, 0, total, needs))

    def _initial_scores(self, weight: CompressibleWeight) -> Tensor:
        """Draw scores uniformly from +-1 / sqrt(fan_in): Kaiming's initialisation with a = sqrt 5.

        The padding row of an embedding, unless a tied layer trains it, gets zeros: it has no
        gradient, and is dropped first.
        """
        seed = derive_seed(self.seed, "scores", weight.name)
        generator = torch.Generator("cpu").manual_seed(seed)
        scores = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1)
        scores.mul_(_fan_in(weight.shape) ** -0.5)
        row = padding_row_of(weight)
        if row is not None:
            scores[row] = 0.0
        return scores.to(weight.tensor.detach())


class SupermaskWeights(ComputedWeights):
    """Scores as parameters `<weight>_scores`; signs beside them, and no weight at all."""

    parts: Mapping[str, Level] = {"scores": "weight"}
    root_names: ClassVar[tuple[str, ...]] = (COUNTS, INDEX, CODED)
    mark: ClassVar[str] = FINGERPRINT
    logged: ClassVar[Logged] = "epochs"

    def __init__(
        self,
        strategy: Supermask,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        kept: Sequence[int],
    ) -> None:
        """Draw the random weights; `attach` then replaces the dense ones.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: The weights to replace.
            kept: How many of each tensor's weights are kept, at least 1.
        """
        super().__init__(strategy, model, weights)
        self.kept = list(kept)
        # Not buffers: they follow from the seed, so that no checkpoint or broadcast needs them.
        self.signs = [
            _draw_signs(shape, derive_seed(strategy.seed, "signs", name))
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        self.scales = [
            strategy.gain * (count / shape.numel() * _fan_in(shape)) ** -0.5
            for count, shape in zip(self.kept, self.shapes, strict=True)
        ]
        described = f"{strategy.gain!r} {self.kept} {[tuple(shape) for shape in self.shapes]}"
        self._fingerprint = fingerprint("supermask", described, *self.signs)

    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`: +-sigma where it is kept, else 0."""
        scores = self.part(index, "scores")
        signs = self._signs_on(index, scores.device)
        return _KeepLargest.apply(scores, signs, self.scales[index], self.kept[index])

    def masks(self) -> list[Tensor]:
        """Return what is kept: bool tensors of the weights' shapes, on their devices."""
        parts = [self.part(index, "scores").detach() for index in range(len(self.shapes))]
        return [_mask(scores, kept) for scores, kept in zip(parts, self.kept, strict=True)]

    def metrics(self, example: Tensor) -> dict[str, float]:
        """See `Compression.metrics`: the health of the masks."""
        return metrics_of(self, self.masks(), example)

    @property
    def num_values(self) -> int:
        """Number of kept weights: what is learned is which."""
        return sum(self.kept)

    @property
    def value_bytes(self) -> int:
        """Nothing: the kept weights are drawn again."""
        return 0

    @property
    def index_bytes(self) -> int:
        """Bytes of counts, masks and fingerprint; sigma follows from count, shape and gain."""
        if self.strategy.coding != "none":
            return tensor_bytes(self.index_tensors().values())
        return index_bytes(self.kept, self.shapes) + FINGERPRINT_BYTES

    @property
    def index_format(self) -> str:
        """The formats of the masks, each with its number of weights, or "gaps"."""
        is_coded = self.strategy.coding != "none" and CODED in self.index_tensors()
        return "gaps" if is_coded else index_format(self.kept, self.shapes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the signs, which stay in memory while training."""
        return sum(signs.numel() * signs.itemsize for signs in self.signs)

    def stored_values(self) -> dict[str, Tensor]:
        """Nothing: the kept weights are drawn again."""
        return {}

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        positions = [mask.reshape(-1).nonzero().squeeze(1) for mask in self.masks()]
        return {**pack(positions, self.shapes, self.strategy.coding), **self.structure()}

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: what identifies the random weights and their number."""
        return {FINGERPRINT: torch.tensor(self._fingerprint, dtype=torch.int64)}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Check that scores of another rank or a checkpoint belong to these weights.

        Raises:
            InputError: They were learned for others.
        """
        self.check_fingerprint(structure)

    def check_fingerprint(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that masks or scores belong to these random weights.

        Raises:
            InputError: They do not.
        """
        if not is_fingerprint(tensors.get(FINGERPRINT), self._fingerprint):
            raise InputError(
                f"{FINGERPRINT}: these masks belong to random weights of another seed, ratio, "
                "gain, version or backbone"
            )

    def _signs_on(self, index: int, device: torch.device) -> Tensor:
        if self.signs[index].device != device:
            # Moved in inference mode, they could not be used in training.
            with torch.inference_mode(False):
                self.signs[index] = self.signs[index].to(device)
        return self.signs[index]


class _KeepLargest(torch.autograd.Function):
    """scale * sign where |score| is among the `kept` largest, else 0; straight-through."""

    @staticmethod
    def forward(scores: Tensor, signs: Tensor, scale: float, kept: int) -> Tensor:
        return (signs * _mask(scores, kept)).to(scores.dtype).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, signs, ctx.scale, _ = inputs
        ctx.save_for_backward(scores, signs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, signs = ctx.saved_tensors
        gradient = gradients[0] * signs * ctx.scale
        # The slope of |s|; taken as 1 at 0, where the derivative would keep a score for ever.
        return torch.where(scores < 0, -gradient, gradient), None, None, None


def _mask(scores: Tensor, kept: int) -> Tensor:
    """Keep exactly the `kept` largest |scores|, and of equal ones the first."""
    sizes = scores.detach().abs().reshape(-1)
    smallest = sizes.kthvalue(len(sizes) - kept + 1).values
    mask = sizes >= smallest
    surplus = int(mask.sum()) - kept
    if surplus > 0:
        ties = (sizes == smallest).nonzero().squeeze(1)
        mask[ties[-surplus:]] = False
    return mask.view(scores.shape)


def _counts(weights: Sequence[CompressibleWeight], share: float) -> list[int]:
    return [max(1, round(share * weight.numel)) for weight in weights]


def _draw_signs(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return bits.mul_(2).sub_(1)


def _fan_in(shape: Sequence[int]) -> int:
    """All dimensions but the first, as PyTorch's initialisation counts them."""
    return prod(shape[1:])
