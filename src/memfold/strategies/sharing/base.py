"""Options and budget that all sharing strategies have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.budget import Budget, Stored
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.materialise import dense_weights, device_of
from memfold.compression.parametrised import Parametrised
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Strategy
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.options import Positive
from memfold.strategies.sharing.gradient_scale import GradientScale
from memfold.strategies.sharing.hashing import HASH_RANGE
from memfold.strategies.sharing.initial import InitialValues, InitialWeights
from memfold.strategies.sharing.mapping import Sign, SlotMapping, Span, spans_of
from memfold.strategies.sharing.products import Choice
from memfold.strategies.sharing.shared_vector import Autograd, SharedVector, stored_like

__all__ = ["SharingStrategy"]


@dataclass(frozen=True, kw_only=True)
class SharingStrategy(Strategy):
    """Let every weight be a signed, scaled view into one vector of m trained numbers."""

    initialises: ClassVar[bool] = True
    unshardable: ClassVar[str | None] = (
        "all layers read one vector, which is small and needed whole in every step; trainer=ddp is "
        "right, it reduces that vector once"
    )
    parametrised: ClassVar[Parametrised] = "stateless"

    share_biases: bool = False
    """Take the biases of layers, not of norms, into the vector as well, like weights of an input
    that is always 1: in small files they are much of the bytes."""
    sign: Sign = "column"
    """What has a random sign of its own: each row and each column of a tensor (`column`), each
    contiguous run of slots (`run`), or each weight (`weight`)."""
    gradient_scale: GradientScale = "length"
    """Gamma: `length` (1/sqrt(load)) keeps the length of the dense model's step, so that one
    learning rate serves every ratio; `projection` (1/load) is the paper's theory; `none` is 1."""
    initial_scale: Positive | None = None
    """Standard deviation of the initial values; null gives each slot the root mean square of its
    weights' scales, and so unit gain, which Adam needs."""
    initial_values: InitialValues = "random"
    """What phi is at the start, below ratio 1: drawn anew with each layer's spread (`random`), or
    what comes nearest to the dense weights (`least_squares`), which is for trained ones."""
    autograd: Autograd = "auto"
    """`lean` builds weights again for the backward pass and collects one gradient of m numbers;
    `whole` builds all weights at once, which is faster where they are small; `classic` leaves all
    to PyTorch: the same numbers to rounding, from more memory. `auto` is `whole` for models of at
    most 4 MiB, unless `linear` names a way without weights, and `lean` for all others."""

    @property
    def takes_biases(self) -> bool:
        """See the option."""
        return self.share_biases

    @abstractmethod
    def mapping(self, spans: Sequence[Span], num_slots: int) -> SlotMapping:
        """Make the mapping of all spans onto `num_slots` values.

        Raises:
            InputError: There are too few values for this mapping.
        """

    def spans(self, model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> tuple[Span, ...]:
        """Say where each weight lies; several may lie in one place."""
        del model
        return spans_of(weights)

    def least_values(self, weights: Sequence[CompressibleWeight]) -> int:
        """Return how few values the mapping takes; a budget cannot be smaller."""
        return 1

    def linear_path(self) -> Choice:
        """How layers multiply with a weight; only windows of consecutive slots leave a choice."""
        return "weight"

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> SharedVector:
        """See `Strategy.build`."""
        check_replaceable(model, weights, initialises=True)
        mapping = self._mapping(model, weights, self._num_values(model, weights))
        places = zip(weights, mapping.spans, strict=True)
        lost = [w for w, span in places if not mapping.is_bijection or span.name != w.name]
        if self.initial_values == "random" and lost:
            report_loss(
                lost,
                context,
                f"{self.name} keeps none of their values at this ratio, and draws new ones; "
                "compression.initial_values=least_squares starts from what comes nearest to them",
            )
        device = device_of(model, weights)
        # The default device may be meta: small tensors of the mapping are made without naming one.
        with torch.device("cpu"), dense_weights(model, weights, device) as passing:
            initial = InitialWeights(weights, mapping, device, self.initial_values)
            for index in passing:
                initial.take(index)
            shared = self._shared(model, weights, mapping, initial.scales)
            values = initial.values(shared, self.seed)
        shared.share(values)
        return shared

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> SharedVector:
        """See `Strategy.rebuild`."""
        check_replaceable(model, weights, initialises=True)
        device, dtype = device_of(model, weights), weights[0].tensor.dtype
        mapping = self._mapping(model, weights, num_values)
        shared = self._shared(model, weights, mapping, [1.0] * len(weights))
        shared.share(shared.accept(tensors).to(device=device, dtype=dtype))
        return shared

    def _mapping(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], num_values: int
    ) -> SlotMapping:
        if not 0 < num_values < HASH_RANGE:
            raise InputError(f"{num_values} shared values: at most {HASH_RANGE - 1} are possible")
        return self.mapping(self.spans(model, weights), num_values)

    def _shared(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        mapping: SlotMapping,
        scales: list[float],
    ) -> SharedVector:
        return SharedVector(
            self,
            model,
            weights,
            mapping,
            scales,
            gradient_scale=self.gradient_scale,
            initial_scale=self.initial_scale,
            autograd=self.autograd,
            linear=self.linear_path(),
        )

    def _num_values(self, model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> int:
        most = max(span.stop for span in self.spans(model, weights))
        if self.budget_bytes is None:
            return min(most, self.target_values(weights))
        dtype, num_tensors = weights[0].tensor.dtype, len(weights)
        least = self.least_values(weights)

        def choose(count: int) -> Stored:
            return stored_like(count, num_tensors, dtype)

        needs = f"{least} shared value{'s' * (least > 1)}"
        return Budget(self, model, weights).most(choose, least, most, needs)
