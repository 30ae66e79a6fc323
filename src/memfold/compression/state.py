"""The state that a strategy leaves on a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.accounting import state_tensors, tensor_bytes, ties_of
from memfold.compression.fake_quantisation import FakeQuantisation
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.quantisation import packed_like, quantise

if TYPE_CHECKING:
    from memfold.compression.strategy import Strategy

__all__ = ["STATE", "Compression", "Logged", "compression_of", "compressions_in"]

Logged = Literal["never", "changes", "epochs"]

STATE = "_memfold_compression"
"""Attribute of a root module that has one."""


class Compression(ABC):
    """The state that a strategy leaves on a model: what replaces the compressible weights.

    It hangs on the root module as a plain attribute, so that `copy.deepcopy` and pickling take it
    along. Everything that it trains or stores is registered on the model or returned by
    `stored_values` and `index_tensors`.
    """

    logged: ClassVar[Logged] = "never"
    """When a training logs `metrics`: first and whenever the structure has changed, or first and at
    the end of every epoch, because it changes with every step."""
    is_resizable: ClassVar[bool] = False
    """Whether a state dict that is loaded decides how many values each weight has."""

    def __init__(
        self, strategy: "Strategy", model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        self.strategy = strategy
        self.model = model
        self.names: list[str] = [weight.name for weight in weights]
        self.shapes: list[torch.Size] = [weight.shape for weight in weights]
        own = {owner.name for weight in weights for owner in weight.owners}
        self.ties = {n: first for n, first in ties_of(model).items() if {n, first} & own}
        """Of these weights in the dense model: see `ties_of`."""
        self.structure_version = 0
        """Counts the changes of structure since the model was compressed."""
        self.structured: tuple[str, ...] = ()
        """Names of the tensors that were left untouched because of their initial values."""
        self.rounding: FakeQuantisation | None = None
        """Set where the training knows the bits of the artifact."""

    @property
    def num_weights(self) -> int:
        """Number n of compressible weights."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the compressible weights in the dense model."""
        return self.num_weights * self.dtype.itemsize

    @property
    @abstractmethod
    def num_values(self) -> int:
        """Number of learned values stored in their place."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype in which the values are held."""

    @property
    def value_bytes(self) -> int:
        """Bytes of the learned values as an artifact packs them."""
        packing = self.strategy.packing
        if packing.coding != "none":
            packed = (quantise(values, packing) for values in self.value_tensors().values())
            return sum(tensor_bytes(parts.values()) for parts in packed)
        stored = ([v] if isinstance(v, Tensor) else v for v in self.stored_values().values())
        return sum(
            tensor_bytes(
                packed_like([sum(v.numel() for v in values)], packing, values[0].dtype).values()
            )
            for values in stored
        )

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes of everything else needed to rebuild the weights: masks, indices, scales, seeds."""

    @property
    @abstractmethod
    def index_format(self) -> str:
        """How it is stored where each value belongs: "none", "seed", "bitmask", ..."""

    @property
    def resident_bytes(self) -> int:
        """Bytes kept in training beside parameters and buffers."""
        return self.index_bytes

    @abstractmethod
    def owned_names(self) -> frozenset[str]:
        """State-dict names that hold the compressed weights; all others are untouched."""

    @abstractmethod
    def stored_values(self) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """Return the parameters whose values an artifact stores.

        Returns:
            Name of a tensor in the artifact -> the parameter, which keeps its shape there, or
            parameters that are one vector there, each flattened.
        """

    def value_tensors(self) -> dict[str, Tensor]:
        """Learned values, as an artifact stores them: `value_bytes` once packed."""
        return {
            name: tensors.detach()
            if isinstance(tensors, Tensor)
            else torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
            for name, tensors in self.stored_values().items()
        }

    def trained(self, parameter: Tensor) -> Tensor:
        """Return what is trained in a parameter, also while the model computes with fewer bits."""
        return parameter if self.rounding is None else self.rounding.trained(parameter)

    @abstractmethod
    def index_tensors(self) -> dict[str, Tensor]:
        """What an artifact stores beside the values: `index_bytes` bytes in all."""

    def dense_shapes(self) -> dict[str, torch.Size]:
        """Shapes in the dense model of untouched tensors that have another one here."""
        return {}

    @property
    def lost_bytes(self) -> int:
        """Bytes by which the untouched tensors were larger in the dense model."""
        tensors = state_tensors(self.model)
        return sum(
            (prod(shape) - tensors[name].numel()) * tensors[name].itemsize
            for name, shape in self.dense_shapes().items()
        )

    def structure(self) -> dict[str, Tensor]:
        """Tensors that say where the values belong, when that is not a function of the seed."""
        return {}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Take over the structure of another rank; the values keep their places where they can."""
        del structure

    def reach(self, parameter: Tensor) -> Tensor | None:
        """Return how far the weights move where each entry of a parameter moves by one.

        Returns:
            The square root of the summed squares over the weights, of the parameter's shape;
            `None` where an entry stands for one weight, or is not counted otherwise.
        """
        del parameter
        return None

    def entries(self) -> Mapping[Tensor, tuple[torch.Size, Tensor]]:
        """Return the parameters that are some entries of a weight, which is 0 elsewhere.

        One for each weight, in their order and that of `stored_values`, or none at all.

        Returns:
            Parameter (N,) -> the shape of the weight, and flat positions in it, int64 (N,).
        """
        return {}

    def sources(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return which stored value each entry of a weight is, times what.

        Args:
            index: Of the weight.

        Returns:
            Of the weight's shape, on the CPU: int64, the place of a value in all `value_tensors`
            end to end, -1 where the entry is 0; and float64 factors. `None` where entries are no
            single values times numbers.
        """
        entries = list(self.entries().items())
        if not entries:
            return None
        parameter, (shape, positions) = entries[index]
        start = sum(earlier.numel() for earlier, _ in entries[:index])
        places = torch.full((shape.numel(),), -1)
        places[positions.cpu()] = torch.arange(start, start + parameter.numel())
        return places.view(shape), torch.ones((), dtype=torch.float64).expand(shape)

    def prepare_step(self, step: int, total_steps: int) -> None:
        """Get ready for the forward pass of optimizer step number `step`, counted from 0."""
        del step, total_steps

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
        """See the function `before_step`."""
        del optimizer, step, total_steps

    def extra_loss(self) -> Tensor | None:
        """Return a term of the training loss, a scalar; `None` adds nothing: `extra_loss`."""
        return None

    def metrics(self, example: Tensor) -> dict[str, float]:
        """Measure what is worth a log, when `logged` says.

        Args:
            example: A batch of inputs, of which only the shape matters.

        Returns:
            Name -> number.
        """
        del example
        return {}

    def release(self) -> None:  # noqa: B027 (most strategies keep nothing)
        """Let go of what was kept from one evaluation batch to the next."""

    @abstractmethod
    def check_places(self) -> None:
        """Check that the model still has every compressed weight where it was.

        Raises:
            InputError: A layer was replaced after the model was compressed.
        """

    @abstractmethod
    def restore_dense(self) -> None:
        """Put plain dense parameters back, in place, and leave no trace of the compression."""


def compressions_in(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, Compression]]:
    """Return the compressions of a model and of everything that it holds.

    Args:
        model: Any module.
        remove_duplicate: Whether a part that `model` holds at several places is named once.

    Returns:
        What comes before the names in `model`'s state dict ("", "module.", ...), and the
        compression.
    """
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    found = ((path, module.__dict__.get(STATE)) for path, module in modules)
    return [(f"{path}." if path else "", state) for path, state in found if state is not None]


def compression_of(model: nn.Module) -> Compression | None:
    """Return the compression of a model, or of the one compressed model that it holds.

    Returns:
        `None` where there is none.

    Raises:
        InputError: The model is not compressed itself and holds several that are.
    """
    own = model.__dict__.get(STATE)
    if own is not None:
        return own
    found = compressions_in(model)
    if len(found) > 1:
        names = ", ".join(prefix.removesuffix(".") for prefix, _ in found)
        raise InputError(
            f"{type(model).__name__} holds several compressed models ({names}): give the one that "
            "is meant"
        )
    return found[0][1] if found else None
