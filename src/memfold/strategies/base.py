"""What every strategy is: options, a registry, and the state it leaves on a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from math import prod
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.quantisation import check_bits, packed_bytes
from memfold.strategies.accounting import state_tensors, tensor_bytes
from memfold.strategies.computed import check_computable, computed_sources
from memfold.strategies.selection import CompressibleWeight, named_weights, select_weights

__all__ = [
    "Compression",
    "Context",
    "Strategy",
    "before_step",
    "check_not_compressed",
    "check_replaceable",
    "check_whole",
    "compression_of",
    "densify",
    "set_number",
    "strategy_class",
    "strategy_names",
]

DEFAULT_RATIO = 0.1
_STATE = "_memfold_compression"
_REGISTRY: dict[str, type["Strategy"]] = {}


@dataclass(frozen=True)
class Context:
    """What a strategy may look at while it compresses a model."""

    data: Iterable[tuple[Tensor, Tensor]] | None = None
    """Batches of (input, target); only data-informed strategies need them."""
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """(output, target) -> scalar."""


class Compression(ABC):
    """The state that a strategy leaves on a model: what replaces the compressible weights.

    It hangs on the root module as a plain attribute, so that `copy.deepcopy` and pickling take it
    along. Everything that it trains or stores is registered on the model or returned by
    `value_tensors` and `index_tensors`.
    """

    def __init__(
        self, strategy: "Strategy", model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        self.strategy = strategy
        self.model = model
        self.names: list[str] = [weight.name for weight in weights]
        self.shapes: list[torch.Size] = [weight.shape for weight in weights]
        self.structure_version = 0
        """Counts the changes of structure since the model was compressed."""

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
        """Bytes of the learned values, packed with the strategy's `bits`."""
        return packed_bytes(self.num_values, self.strategy.bits, self.dtype.itemsize)

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
    def value_tensors(self) -> dict[str, Tensor]:
        """Learned values, as an artifact stores them: `value_bytes` once packed."""

    @abstractmethod
    def index_tensors(self) -> dict[str, Tensor]:
        """What an artifact stores beside the values: `index_bytes` bytes in all."""

    def dense_shapes(self) -> dict[str, torch.Size]:
        """Shapes in the dense model of untouched tensors that have another one here."""
        return {}

    def structure(self) -> dict[str, Tensor]:
        """Tensors that say where the values belong, when that is not a function of the seed."""
        return {}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Take over the structure of another rank; the values keep their places where they can."""
        del structure

    def prepare_step(self, step: int, total_steps: int) -> None:
        """Get ready for the forward pass of optimizer step number `step`, counted from 0."""
        del step, total_steps

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
        """See the function `before_step`."""
        del optimizer, step, total_steps

    @abstractmethod
    def check_places(self) -> None:
        """Check that the model still has every compressed weight where it was.

        Raises:
            InputError: A layer was replaced after the model was compressed.
        """

    @abstractmethod
    def restore_dense(self) -> None:
        """Put plain dense parameters back, in place, and leave no trace of the compression."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """What makes a model small. Subclasses register themselves: `class X(Strategy, name="x")`."""

    ratio: float | None = None
    """Stored learned values over compressible weights, in (0, 1]; 0.1 when no budget is given."""
    budget_bytes: int | None = None
    """Stored bytes of the whole model, instead of `ratio`."""
    bits: int = 32
    """Bits per stored value: 16, 8 or 4; 32 for the values' own dtype. Training is not affected."""
    seed: int = 0
    """Everything random derives from it."""
    include: tuple[str, ...] = ("*",)
    """Glob patterns of the tensors or modules to compress."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of the tensors or modules to leave untouched."""
    min_size: int = 0
    """Tensors with fewer elements are left untouched."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None) -> None:
        """Register a concrete strategy under `name`; abstract families give none."""
        super().__init_subclass__()
        if name is None:
            return
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise TypeError(f"strategy {name!r} is registered twice: {known} and {cls}")
        cls.name = name
        _REGISTRY[name] = cls

    def __post_init__(self) -> None:
        """Check the options that all strategies share.

        Raises:
            InputError: An option is out of range, or `ratio` and `budget_bytes` are both given.
        """
        for key in ("include", "exclude"):
            object.__setattr__(self, key, _patterns(key, getattr(self, key)))
        for key in ("budget_bytes", "bits", "seed", "min_size"):
            set_number(self, key, int)
        check_bits(self.bits)
        set_number(self, "ratio", float)
        if self.ratio is not None and self.budget_bytes is not None:
            raise InputError(
                f"ratio={self.ratio} and budget_bytes={self.budget_bytes} are both given; "
                "set one of them and leave the other null"
            )
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise InputError(f"ratio must be a number in (0, 1], got {self.ratio!r}")
        budget = self.budget_bytes
        if budget is not None and not (_is_integer(budget) and budget > 0):
            raise InputError(f"budget_bytes must be a positive whole number, got {budget!r}")
        if not _is_integer(self.seed):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")
        if not (_is_integer(self.min_size) and self.min_size >= 0):
            raise InputError(
                f"compression.min_size must be a whole number of at least 0, got {self.min_size!r}"
            )

    def to_dict(self) -> dict[str, object]:
        """Return `name` and every option, made of plain values (tuples become lists)."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": self.name, **options}

    @staticmethod
    def from_dict(options: Mapping[str, object]) -> "Strategy":
        """Rebuild a strategy from `to_dict`.

        Raises:
            InputError: The name or an option is unknown, or a value is out of range.
        """
        options = dict(options)
        cls = strategy_class(options.pop("name", None))
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InputError(
                f"compression.{unknown[0]} is not an option of {cls.name}; options: "
                + ", ".join(known)
            )
        return cls(**options)  # type: ignore[arg-type]

    def compress(self, model: nn.Module, context: Context) -> Compression:
        """Rewrite `model` in place; it is unchanged when this raises.

        Raises:
            InputError: The model cannot be compressed with these options.
        """
        compression = self.build(model, self._select(model), context)
        model.__dict__[_STATE] = compression
        return compression

    def restore(
        self,
        model: nn.Module,
        names: Sequence[str],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> Compression:
        """Turn a dense model into the one whose stored tensors these are.

        Args:
            model: Dense; unchanged when this raises.
            names: State-dict names of the compressed weights, in their order.
            num_values: Number of stored values.
            tensors: `value_tensors` and `index_tensors` of that model's compression; others are
                ignored.

        Raises:
            InputError: A weight or tensor is missing or does not fit.
        """
        check_not_compressed(model)
        compression = self.rebuild(model, named_weights(model, names), num_values, tensors)
        model.__dict__[_STATE] = compression
        return compression

    @abstractmethod
    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> Compression:
        """Replace `weights` in `model`, after every check that can fail.

        Args:
            model: The root module.
            weights: At least one, in registration order.
            context: Data and loss, for strategies that need them.
        """

    @abstractmethod
    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> Compression:
        """Like `build`, with the tensors that `Compression` stores."""

    def target_values(self, weights: Sequence[CompressibleWeight]) -> int:
        """Return how many learned values `ratio` allows: the nearest whole number, at least 1."""
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        return max(1, round(ratio * sum(weight.numel for weight in weights)))

    def value_room(self, model: nn.Module, weights: Sequence[CompressibleWeight]) -> int:
        """Return the bytes that `budget_bytes` leaves for values and indices.

        Raises:
            InputError: The untouched tensors alone take more.
        """
        assert self.budget_bytes is not None
        dense = sum(weight.numel * weight.tensor.itemsize for weight in weights)
        untouched = tensor_bytes(state_tensors(model).values()) - dense
        if untouched >= self.budget_bytes:
            raise InputError(
                f"budget_bytes={self.budget_bytes} leaves no room for weights: the untouched "
                f"tensors alone (biases, norms, buffers) take {untouched} bytes"
            )
        return self.budget_bytes - untouched

    def _select(self, model: nn.Module) -> tuple[CompressibleWeight, ...]:
        check_not_compressed(model)
        return select_weights(
            model, include=self.include, exclude=self.exclude, min_size=self.min_size
        )


def before_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, total_steps: int
) -> None:
    """Let the strategy act between the backward pass and the optimizer's step.

    Dynamic sparse training changes its structure here, low-rank factors get their decay. Call it
    once per optimizer step, on every rank, when gradients are complete (reduced, unscaled).
    Strategies that do nothing while training ignore it. A strategy that replaces the optimizer's
    step, as RigL does where it changes the structure, leaves all gradients at `None`: optimizers
    skip such parameters.

    Args:
        model: A compressed model; any other is left alone.
        optimizer: It trains the model's parameters.
        step: Optimizer steps done before this one.
        total_steps: Optimizer steps in the whole training.
    """
    compression = compression_of(model)
    if compression is not None:
        compression.before_step(optimizer, step, total_steps)
        compression.prepare_step(step + 1, total_steps)


def compression_of(model: nn.Module) -> Compression | None:
    """Return the compression that hangs on this very module, `None` when there is none."""
    return model.__dict__.get(_STATE)


def check_not_compressed(model: nn.Module) -> None:
    """Check that no part of a model is compressed.

    Raises:
        InputError: One is.
    """
    check_whole(model)
    for path, module in model.named_modules():
        found = compression_of(module)
        if found is not None:
            where = f"its part {path!r}" if path else "it"
            raise InputError(f"the model is compressed already: {where} has {found.strategy}")


def check_whole(model: nn.Module) -> None:
    """Check that the weights of a compressed model are not looked at without their values.

    Raises:
        InputError: `model` is a part of a compressed model that does not hold the values.
    """
    modules = set(model.modules())
    for path, module in model.named_modules():
        if any(source.root not in modules for source in computed_sources(module)):
            raise InputError(
                f"{path or type(model).__name__} is a part of a compressed model and its values "
                "are elsewhere: use the whole model, or memfold.densify(model) first"
            )


def densify(model: nn.Module) -> nn.Module:
    """Return a plain dense copy of `model` with the same function and state-dict names.

    The copy has the classes, parameters and ties of the backbone as its author wrote it; `model`
    stays as it is.

    Raises:
        InputError: `model` is a part of a compressed model without its values.
    """
    check_whole(model)
    dense = deepcopy(model)
    for module in list(dense.modules()):
        compression = module.__dict__.pop(_STATE, None)
        if compression is not None:
            compression.restore_dense()
    return dense


def check_replaceable(
    model: nn.Module, weights: Sequence[CompressibleWeight], reserved: Sequence[str] = ()
) -> None:
    """Check that these weights can become computed ones with values of one kind.

    Args:
        model: The root module.
        weights: The weights to replace.
        reserved: Attributes of the root that must be free.

    Raises:
        InputError: They differ in dtype or device, have no values, or their module refuses.
    """
    tensors = [weight.tensor for weight in weights]
    for key, values in (
        ("dtypes", {str(t.dtype) for t in tensors}),
        ("devices", {str(t.device) for t in tensors}),
    ):
        if len(values) > 1:
            raise InputError(
                f"the compressible weights have several {key} ({', '.join(sorted(values))}); "
                "one is needed: convert the model or narrow compression.include"
            )
    if tensors[0].device == torch.device("meta"):
        raise InputError("the model is on the meta device: its weights have no values to compress")
    attributes: dict[nn.Module, list[str]] = {}
    paths: dict[nn.Module, str] = {}
    for owner in (owner for weight in weights for owner in weight.owners):
        attributes.setdefault(owner.module, []).append(owner.attribute)
        paths[owner.module] = owner.path
    for module, names in attributes.items():
        check_computable(module, names, paths[module])
    for name in reserved:
        if hasattr(model, name):
            raise InputError(f"the model has an attribute {name}, which the compression needs")


def strategy_names() -> tuple[str, ...]:
    """Names of all strategies, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def strategy_class(name: object) -> type[Strategy]:
    """Look a strategy up by name.

    Raises:
        InputError: There is no such strategy; the message lists those that exist.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise InputError(
            f"compression={name} is unknown; strategies: {', '.join(strategy_names())}"
        )
    return _REGISTRY[name]


def set_number(strategy: Strategy, key: str, kind: type[int] | type[float]) -> None:
    """Turn a number of any library in a field into a plain int or float; leave all else.

    Numbers end in JSON and in hashes, where 5 and numpy.int64(5) have to be the same.
    """
    value = getattr(strategy, key)
    if isinstance(value, bool):
        return
    if kind is int and isinstance(value, Integral):
        object.__setattr__(strategy, key, int(value))
    elif kind is float and isinstance(value, Real):
        object.__setattr__(strategy, key, float(value))


def _patterns(key: str, value: object) -> tuple[str, ...]:
    patterns = tuple(value) if isinstance(value, Iterable) else None
    if patterns is None or isinstance(value, str) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"compression.{key} must be a list of patterns, got {value!r}")
    return patterns


def _is_number(value: object) -> bool:
    return isinstance(value, float)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
