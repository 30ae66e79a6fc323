"""A smaller dense network: the same backbone, narrower, trained from scratch.

The plainest rival of every other strategy, known as "small dense" in the literature on sparse
training (Evci et al., "Rigging the lottery", 2020, arXiv 1911.11134): channels times about the
square root of the ratio. Here the widths are found on the real sizes, by bisection on one scale
s in (0, 1] with

    width_i(s) = max(1, floor(s W_i + o_i)),      offsets o_i spread over (0, 1)

so that layers step one after the other and sizes grow in fine steps; the narrowest layers have the
largest offsets. Where the steps are too coarse, single widths are moved until the size is within
2 % of the budget.

What shrinks: everything, also activations and operations. What does not: the input and the
outputs, so the first and the last layer shrink in one direction only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memfold.compression.accounting import state_tensors
from memfold.compression.budget import Budget, Stored, like
from memfold.compression.materialise import check_has_values
from memfold.compression.parametrised import Parametrised
from memfold.compression.selection import CompressibleWeight, named_weights
from memfold.compression.strategy import Context, Ratios, Strategy
from memfold.compression.trained_values import report_loss
from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.dense import DenseWeights
from memfold.strategies.width_search import Limits, find_widths

__all__ = ["Narrowable", "Small"]

_WIDTHS = "memfold.widths"
_TOLERANCE = 0.02


class Narrowable(Protocol):
    """What `small` needs of a backbone, beside being an `nn.Module`."""

    @property
    def widths(self) -> Sequence[int]:
        """Every width that is free, at least one."""
        ...

    def with_widths(self, widths: Sequence[int]) -> nn.Module:
        """Build a fresh network of the same class and options with these widths.

        It must have the same state-dict names, and be built on the meta device when that is the
        default (`with torch.device("meta")`), where tensors have no values.
        """
        ...


class NarrowWeights(DenseWeights):
    """The weights of the narrow network; they count as learned values."""

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        dense_state: Mapping[str, torch.Size],
        widths: tuple[int, ...],
    ) -> None:
        """Describe a model that is narrow already.

        Args:
            strategy: Who made it.
            model: The narrow network.
            weights: Those of the narrow network.
            dense_state: Name -> shape in the dense model, of all parameters and buffers.
            widths: Of the narrow network.
        """
        super().__init__(strategy, model, weights)
        self._narrow_shapes = dict(zip(self.names, self.shapes, strict=True))
        self.shapes = [dense_state[name] for name in self.names]
        self._widths = widths
        self._untouched_shapes = {
            name: dense_state[name]
            for name, tensor in state_tensors(model, leave_out=self.owned_names()).items()
            if tensor.shape != dense_state[name]
        }

    @property
    def num_values(self) -> int:
        """Weights of the narrow network."""
        return sum(prod(shape) for shape in self._narrow_shapes.values())

    @property
    def dense_bytes(self) -> int:
        """Each tensor in its own dtype."""
        values = self.value_tensors().values()
        return sum(
            prod(shape) * value.itemsize for shape, value in zip(self.shapes, values, strict=True)
        )

    @property
    def index_bytes(self) -> int:
        """The widths, int32."""
        return len(self._widths) * torch.int32.itemsize

    @property
    def index_format(self) -> str:
        """See `Compression.index_format`."""
        return "widths"

    def index_tensors(self) -> dict[str, Tensor]:
        """The widths."""
        return {_WIDTHS: torch.tensor(self._widths, dtype=torch.int32)}

    def dense_shapes(self) -> dict[str, torch.Size]:
        """Biases, norms and buffers are narrower too."""
        return self._untouched_shapes

    def check_places(self) -> None:
        """See `Compression.check_places`."""
        state = state_tensors(self.model)
        for name, shape in self._narrow_shapes.items():
            if name not in state or state[name].shape != shape:
                raise InputError(f"{name}: its module was replaced after the model was compressed")


@dataclass(frozen=True, kw_only=True)
class Small(Strategy, name="small"):
    """Build the backbone narrower, so that it has the size that was asked for, within 2 %.

    With `ratio` that is the number of weights; with `budget_bytes` the bytes of the file, which
    are never more than the budget, and less than 98 % of it where no widths come closer.
    """

    ratios: ClassVar[Ratios] = "steps"
    unshardable: ClassVar[str | None] = None
    trains_matrices: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = True
    parametrised: ClassVar[Parametrised] = "any"

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> NarrowWeights:
        """See `Strategy.build`.

        The initial values of the narrow network are fresh. The model takes over its attributes;
        hooks and attributes that were set on the dense model's root are gone.

        Raises:
            InputError: The model cannot be built narrower, some of its tensors are to stay as they
                are, or no widths have the size that was asked for.
        """
        check_has_values(model)
        dense = _widths_of(model)
        self._check_nothing_stays(model)
        names = [weight.name for weight in weights]
        sizes = _Sizes(model, names)
        if self.budget_bytes is None:
            target, measure = self.target_values(weights), sizes.num_values
            limits = Limits(target, target * (1 - _TOLERANCE), target * (1 + _TOLERANCE))
            request = f"ratio={self.asked_ratio}"
            unit = "weights"
        else:
            budget, target = Budget(self, model, weights), self.budget_bytes

            def measure(widths: tuple[int, ...]) -> int:
                return budget.file_bytes(sizes.stored(widths))

            limits = Limits(target, target * (1 - _TOLERANCE), target)
            request, unit = f"budget_bytes={target}", "bytes"
        widths = find_widths(dense, measure, limits, f"{request} for {type(model).__name__}", unit)
        if widths != dense:
            message = "small keeps none of their values: a narrower network starts fresh"
            report_loss(weights, context, message)
        return self._replace(model, names, widths, {})

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> NarrowWeights:
        """See `Strategy.rebuild`."""
        check_has_values(model)
        dense = _widths_of(model)
        stored = tensors.get(_WIDTHS)
        if stored is None or stored.is_floating_point() or stored.shape != (len(dense),):
            raise InputError(f"the artifact has no {len(dense)} widths for {type(model).__name__}")
        widths = tuple(int(width) for width in stored)
        if not all(1 <= width <= most for width, most in zip(widths, dense, strict=True)):
            raise InputError(f"the artifact's widths {list(widths)} do not fit {list(dense)}")
        names = [weight.name for weight in weights]
        for name in names:
            if name not in tensors:
                raise InputError(f"the artifact has no tensor {name}")
        if sum(tensors[name].numel() for name in names) != num_values:
            raise InputError(f"the artifact has not the {num_values} values that it names")
        return self._replace(model, names, widths, tensors)

    def _check_nothing_stays(self, model: nn.Module) -> None:
        for key, default in (("include", ("*",)), ("exclude", ()), ("min_size", 0)):
            value = getattr(self, key)
            if value != default:
                raise InputError(
                    f"compression.{key}={value}: small narrows the whole network and can leave no "
                    "tensor as it is; drop the option"
                )
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise InputError(
                    f"{name} is frozen: small starts a new network and cannot keep its values"
                )

    def _replace(
        self,
        model: nn.Module,
        names: Sequence[str],
        widths: tuple[int, ...],
        tensors: Mapping[str, Tensor],
    ) -> NarrowWeights:
        """Turn `model` into the network with these widths, which `tensors` have to fit."""
        shapes = {name: tensor.shape for name, tensor in state_tensors(model).items()}
        narrow = model
        if widths != _widths_of(model):
            with _drawing(derive_seed(self.seed, "small")):
                narrow = _narrow(model, widths, torch.device("cpu"))
            _match_placement(narrow, model)
        for name, tensor in state_tensors(narrow).items():
            if name in tensors and tensors[name].shape != tensor.shape:
                raise InputError(
                    f"the artifact's {name} has shape {tuple(tensors[name].shape)}, its widths "
                    f"make that {tuple(tensor.shape)}"
                )
        if narrow is not model:
            model.__dict__.clear()
            model.__dict__.update(narrow.__dict__)
        return NarrowWeights(self, model, named_weights(model, names), shapes, widths)


class _Sizes:
    """Sizes of the network with other widths, measured on the meta device."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self._names = frozenset(names)
        self._dtypes = {name: tensor.dtype for name, tensor in state_tensors(model).items()}

    def num_values(self, widths: tuple[int, ...]) -> int:
        """Return the number of weights."""
        return self.stored(widths).num_values

    def stored(self, widths: tuple[int, ...]) -> Stored:
        """Describe what the network stores."""
        with _drawing(0), _WithoutDraws():
            narrow = _narrow(self._model, widths, torch.device("meta"))
        state = {n: like(t.shape, self._dtypes[n]) for n, t in state_tensors(narrow).items()}
        values = {name: tensor for name, tensor in state.items() if name in self._names}
        untouched = {name: tensor for name, tensor in state.items() if name not in self._names}
        num_values = sum(tensor.numel() for tensor in values.values())
        indices = {_WIDTHS: like([len(widths)], torch.int32)}
        return Stored(num_values, values, indices, untouched)


class _WithoutDraws(TorchFunctionMode):
    """Initialisers draw nothing: on the meta device that takes milliseconds for each tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _widths_of(model: nn.Module) -> tuple[int, ...]:
    missing = [name for name in ("widths", "with_widths") if not hasattr(model, name)]
    if missing:
        raise InputError(
            f"compression=small needs a backbone that can be built narrower: "
            f"{type(model).__name__} has no {' and no '.join(missing)} (docs/strategies/small.md)"
        )
    widths = cast(Narrowable, model).widths
    is_list = isinstance(widths, Sequence) and len(widths) > 0
    if not is_list or not all(type(width) is int and width >= 1 for width in widths):
        raise InputError(
            f"compression=small needs a list of free widths, whole numbers of at least 1: that of "
            f"{type(model).__name__} is {widths!r}"
        )
    return tuple(widths)


def _narrow(model: nn.Module, widths: tuple[int, ...], device: torch.device) -> nn.Module:
    with device:
        narrow = cast(Narrowable, model).with_widths(widths)
    if type(narrow) is not type(model) or _kinds(narrow) != _kinds(model):
        raise InputError(
            f"{type(model).__name__}.with_widths({list(widths)}) must return the same class with "
            "the same parameters and buffers, of other sizes alone"
        )
    return narrow


def _kinds(model: nn.Module) -> dict[str, int]:
    """Names of all parameters and buffers, and their numbers of dimensions."""
    return {name: tensor.dim() for name, tensor in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def _match_placement(narrow: nn.Module, model: nn.Module) -> None:
    """Give `narrow` the mode, and its tensors the device, dtype and flags, that `model` has."""
    narrow.train(model.training)
    like = dict(_tensors(model))
    for name, tensor in _tensors(narrow):
        tensor.data = tensor.data.to(device=like[name].device, dtype=like[name].dtype)
        tensor.requires_grad_(like[name].requires_grad)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Let PyTorch's initialisers draw from a seed of their own; the global state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
