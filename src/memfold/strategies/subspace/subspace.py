"""Subspace training: the weights move from a random point along few random directions.

Chunyuan Li, Heerad Farkhoor, Rosanne Liu and Jason Yosinski, "Measuring the intrinsic dimension of
objective landscapes", ICLR 2018, arXiv 1804.08838.

    theta = theta_0 + sqrt(D / d) P theta_d        theta_d = 0 at first
    gradient of theta_d = P' (gradient of theta)   P: D x d, columns of length 1

theta_d is all that is trained. theta_0 and P follow from the seed and the names of the weights: the
artifact holds theta_d and one number for each weight, how far its initial values spread. With the
factor every weight moves as far as one coordinate does, whatever d is, and left out of the gradient
it keeps the length of the dense step: one learning rate serves every ratio.

What shrinks: parameters, gradients, optimizer state, artifacts, what DDP reduces. What does not:
activations and operations; theta_0 and P are computed anew in every pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.budget import Budget, Stored, like
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.initial_scale import initial_scale_of
from memfold.compression.materialise import dense_weights, device_of
from memfold.compression.parametrised import Parametrised
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Strategy
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.strategies.subspace.projections import Kind
from memfold.strategies.subspace.weights import SCALES, VALUES, SubspaceWeights

__all__ = ["Subspace"]


@dataclass(frozen=True, kw_only=True)
class Subspace(Strategy, name="subspace"):
    """Train d coordinates of all weights, or of each weight, around a random point."""

    initialises: ClassVar[bool] = True
    parametrised: ClassVar[Parametrised] = "stateless"
    unshardable: ClassVar[str | None] = (
        "every layer needs all coordinates, which are few; trainer=ddp is right, it reduces them "
        "once"
    )

    projection: Kind = "fastfood"
    """P: Hadamard transforms, D log D operations (`fastfood`); sqrt(D) entries in every column, d
    sqrt(D) operations (`sparse`); or all of them, D d operations (`dense`)."""
    per: Literal["model", "weight"] = "model"
    """What has coordinates: the model, as in the paper, or each weight, in proportion to its size,
    which costs less where there are many weights."""
    share_biases: bool = False
    """Compute the biases of layers, not of norms, like weights, as the paper does: they leave the
    artifact, and start as random as the weights beside them."""

    @property
    def takes_biases(self) -> bool:
        """See the option."""
        return self.share_biases

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> SubspaceWeights:
        """See `Strategy.build`."""
        check_replaceable(model, weights, initialises=True)
        report_loss(weights, context, "subspace keeps none of their values, and draws new ones")
        subspace = SubspaceWeights(self, model, weights, self._num_values(model, weights))
        device = device_of(model, weights)
        # The default device may be meta, where nothing can be measured.
        with torch.device("cpu"), dense_weights(model, weights, device) as passing:
            scales = {index: initial_scale_of(weights[index]) for index in passing}
            start = {
                VALUES: torch.zeros(subspace.num_values),
                SCALES: torch.tensor([scales[index] for index in sorted(scales)]),
            }
        subspace.accept(weights, start)
        return subspace

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> SubspaceWeights:
        """See `Strategy.rebuild`."""
        check_replaceable(model, weights, initialises=True)
        least, most = self._bounds(weights)
        if not least <= num_values <= most:
            raise InputError(f"the artifact has {num_values} coordinates, not {least} to {most}")
        subspace = SubspaceWeights(self, model, weights, num_values)
        subspace.accept(weights, tensors)
        return subspace

    def _num_values(self, model: nn.Module, weights: Sequence[CompressibleWeight]) -> int:
        least, most = self._bounds(weights)
        if self.budget_bytes is None:
            wanted = self.target_values(weights)
            if wanted < least:
                raise InputError(
                    f"ratio={self.asked_ratio:g} gives {wanted} coordinates for {least} weights; "
                    "compression.per=weight needs one for each: raise ratio or set per=model"
                )
            return wanted
        dtype, scales = weights[0].tensor.dtype, like([len(weights)], torch.float32)

        def choose(count: int) -> Stored:
            return Stored(count, {VALUES: like([count], dtype)}, {SCALES: scales})

        needs = f"{least} coordinate{'s' * (least > 1)}"
        return Budget(self, model, weights).most(choose, least, most, needs)

    def _bounds(self, weights: Sequence[CompressibleWeight]) -> tuple[int, int]:
        """Return how few and how many coordinates there can be."""
        return len(weights) if self.per == "weight" else 1, sum(w.numel for w in weights)
