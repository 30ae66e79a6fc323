"""No compression: the reference that every other strategy is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.accounting import state_tensors, tensor_bytes
from memfold.compression.materialise import check_has_values
from memfold.compression.parametrised import Parametrised
from memfold.compression.selection import CompressibleWeight
from memfold.compression.state import Compression
from memfold.compression.strategy import Context, Ratios, Strategy
from memfold.errors import InputError

__all__ = ["Dense"]


class DenseWeights(Compression):
    """The weights as they are; they count as learned values."""

    def __init__(
        self, strategy: Strategy, model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        super().__init__(strategy, model, weights)
        self._aliases = frozenset(
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if any(tensor is weight.tensor for weight in weights)
        )

    @property
    def num_values(self) -> int:
        """All of them."""
        return self.num_weights

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first weight."""
        return next(iter(self.value_tensors().values())).dtype

    @property
    def dense_bytes(self) -> int:
        """Each tensor in its own dtype."""
        return tensor_bytes(self.value_tensors().values())

    @property
    def index_bytes(self) -> int:
        """Nothing is needed to rebuild the weights."""
        return 0

    @property
    def index_format(self) -> str:
        """Nothing is needed to rebuild the weights."""
        return "none"

    def owned_names(self) -> frozenset[str]:
        """Every state-dict name of the weights, tied ones included."""
        return self._aliases

    def stored_values(self) -> dict[str, Tensor]:
        """The weights, a tied one under its first name."""
        state = state_tensors(self.model)
        return {name: state[name] for name in self.names}

    def sources(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Compression.sources`: one value for each entry."""
        tensors = list(self.stored_values().values())
        start, shape = sum(tensor.numel() for tensor in tensors[:index]), tensors[index].shape
        places = torch.arange(start, start + shape.numel()).view(shape)
        return places, torch.ones((), dtype=torch.float64).expand(shape)

    def index_tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def check_places(self) -> None:
        """Nothing was moved."""

    def restore_dense(self) -> None:
        """Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class Dense(Strategy, name="dense"):
    """Leave the model as it is."""

    ratios: ClassVar[Ratios] = "one"
    unshardable: ClassVar[str | None] = None
    trains_matrices: ClassVar[bool] = True
    parametrised: ClassVar[Parametrised] = "any"

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> DenseWeights:
        """See `Strategy.build`."""
        del context
        check_has_values(model)
        return DenseWeights(self, model, weights)

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> DenseWeights:
        """See `Strategy.rebuild`."""
        del num_values
        check_has_values(model)
        for weight in weights:
            if weight.name not in tensors or tensors[weight.name].shape != weight.shape:
                raise InputError(
                    f"the artifact has no tensor {weight.name} of shape {tuple(weight.shape)}"
                )
        return DenseWeights(self, model, weights)
