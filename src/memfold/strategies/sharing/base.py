"""Options and budget that all sharing strategies have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.strategies.accounting import state_tensors, tensor_bytes
from memfold.strategies.base import DEFAULT_RATIO, Context, Strategy, set_number
from memfold.strategies.computed import check_computable
from memfold.strategies.selection import CompressibleWeight
from memfold.strategies.sharing.hashing import HASH_RANGE
from memfold.strategies.sharing.mapping import Sign, SlotMapping, Span, spans_of
from memfold.strategies.sharing.shared_vector import (
    RESERVED_NAMES,
    GradientScale,
    SharedVector,
    index_bytes,
    initial_scale_of,
)

__all__ = ["SharingStrategy"]


@dataclass(frozen=True, kw_only=True)
class SharingStrategy(Strategy):
    """Let every weight be a signed, scaled view into one vector of m trained numbers."""

    sign: Sign = "run"
    """One random sign per contiguous run of slots (`run`) or per weight (`weight`)."""
    gradient_scale: GradientScale = "length"
    """Gamma: `length` (1/sqrt(load)) keeps the length of the dense model's step, so that one
    learning rate serves every ratio; `projection` (1/load) is the paper's theory; `none` is 1."""
    initial_scale: float | None = None
    """Standard deviation of the initial values; null gives each slot the root mean square of its
    weights' scales, and so unit gain, which Adam needs."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of range.
        """
        super().__post_init__()
        set_number(self, "initial_scale", float)
        if self.sign not in ("run", "weight"):
            raise InputError(f"compression.sign must be run or weight, got {self.sign!r}")
        if self.gradient_scale not in ("length", "projection", "none"):
            raise InputError(
                "compression.gradient_scale must be length, projection or none, "
                f"got {self.gradient_scale!r}"
            )
        scale = self.initial_scale
        if scale is not None and not (isinstance(scale, float) and scale > 0 and isfinite(scale)):
            raise InputError(f"compression.initial_scale must be above 0 or null, got {scale!r}")

    @abstractmethod
    def mapping(self, spans: Sequence[Span], num_slots: int) -> SlotMapping:
        """Make the mapping of all spans onto `num_slots` values.

        Raises:
            InputError: There are too few values for this mapping.
        """

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> SharedVector:
        """See `Strategy.build`."""
        del context
        self._check(model, weights)
        mapping = self._mapping(weights, self._num_values(model, weights))
        scales = [initial_scale_of(weight) for weight in weights]
        shared = self._shared(model, weights, mapping, scales)
        shared.attach(shared.initial_values(weights, self.seed))
        return shared

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> SharedVector:
        """See `Strategy.rebuild`."""
        self._check(model, weights)
        mapping = self._mapping(weights, num_values)
        shared = self._shared(model, weights, mapping, [1.0] * len(weights))
        like = weights[0].tensor
        shared.attach(shared.accept(tensors).to(device=like.device, dtype=like.dtype))
        return shared

    def _mapping(self, weights: tuple[CompressibleWeight, ...], num_values: int) -> SlotMapping:
        if not 0 < num_values < HASH_RANGE:
            raise InputError(f"{num_values} shared values: at most {HASH_RANGE - 1} are possible")
        return self.mapping(spans_of(weights), num_values)

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
        )

    def _num_values(self, model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> int:
        num_weights = sum(weight.numel for weight in weights)
        if self.budget_bytes is None:
            ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            return max(1, round(ratio * num_weights))
        itemsize = weights[0].tensor.dtype.itemsize
        untouched = tensor_bytes(state_tensors(model).values()) - num_weights * itemsize
        fixed = untouched + index_bytes(len(weights))
        available = (self.budget_bytes - fixed) // itemsize
        if available < 1:
            raise InputError(
                f"budget_bytes={self.budget_bytes} leaves no room for shared values: the untouched "
                f"tensors and scales take {fixed} bytes; at least {fixed + itemsize} are needed"
            )
        return min(available, num_weights)

    @staticmethod
    def _check(model: nn.Module, weights: tuple[CompressibleWeight, ...]) -> None:
        tensors = [weight.tensor for weight in weights]
        for key, values in (
            ("dtypes", {str(t.dtype) for t in tensors}),
            ("devices", {str(t.device) for t in tensors}),
        ):
            if len(values) > 1:
                raise InputError(
                    f"the compressible weights have several {key} ({', '.join(sorted(values))}); "
                    "one shared vector needs one: convert the model or narrow compression.include"
                )
        if tensors[0].device == torch.device("meta"):
            raise InputError("the model is on the meta device: its weights have no values to share")
        attributes: dict[nn.Module, list[str]] = {}
        paths: dict[nn.Module, str] = {}
        for owner in (owner for weight in weights for owner in weight.owners):
            attributes.setdefault(owner.module, []).append(owner.attribute)
            paths[owner.module] = owner.path
        for module, names in attributes.items():
            check_computable(module, names, paths[module])
        for name in RESERVED_NAMES:
            if hasattr(model, name):
                raise InputError(
                    f"the model has an attribute {name}, which the shared vector needs"
                )
