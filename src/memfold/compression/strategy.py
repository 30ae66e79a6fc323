"""What every strategy is: options, a budget, and a name in the registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal
from warnings import warn

import torch
from torch import Tensor, nn

from memfold.compression.compressed_model import check_not_compressed, set_compression
from memfold.compression.materialise import check_has_values, structured_weights
from memfold.compression.parametrised import Parametrised, check_parametrised
from memfold.compression.selection import (
    CompressibleWeight,
    check_memory,
    check_state_names,
    is_named,
    named_weights,
    sample_names,
    select_weights,
)
from memfold.compression.state import Compression
from memfold.errors import InputError
from memfold.options import Count, Natural, Ratio, Share, check_fields
from memfold.quantisation import BITS, Coding, Packing

__all__ = [
    "Context",
    "Ratios",
    "Strategy",
    "strategy_class",
    "strategy_names",
]

Ratios = Literal["any", "steps", "few", "one"]
DEFAULT_RATIO = 0.1
_ALL = ("ratio", 1)
Structured = Literal["keep", "share"]
_REGISTRY: dict[str, type["Strategy"]] = {}


@dataclass(frozen=True)
class Context:
    """What a strategy may look at while it compresses a model."""

    data: Iterable[tuple[Tensor, Tensor]] | None = None
    """Batches of (input, target); only data-informed strategies need them."""
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """(output, target) -> scalar."""
    start: Callable[[nn.Module], None] | None = None
    """Gives the dense model the values that training is to start from, once it is known which
    tensors are compressed: that depends on what its constructor drew, whatever comes later. A
    strategy that could keep none of the values refuses."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """What makes a model small. Subclasses register themselves: `class X(Strategy, name="x")`."""

    ratio: Ratio | None = None
    """Stored learned values over compressible weights, in (0, 1]; `default_ratio` when no
    budget is given."""
    budget_bytes: Count | None = None
    """Size of the artifact's file, its header included, instead of `ratio`: as full as the strategy
    can make it, and never fuller. With `coding` it becomes smaller, by what the data allow."""
    bits: int = 32
    """Bits per stored value: 16, or 8 to 3; 32: the values' own dtype."""
    train_bits: int | None = None
    """`bits` that the training knows: it computes with the values that the artifact will hold."""
    train_bits_from: Share = 0.5
    """Part of the training after which it does, in [0, 1]."""
    block_size: int = 64
    """Packed values that share a scale of 2 bytes, at 8 bits and fewer: 16, 32, 64, 128 or 256."""
    coding: Coding = "none"
    """How packed values (8 bits and fewer) and positions are coded: as they are, or by their
    frequencies (`huffman`), where that takes fewer bytes."""
    untouched_bits: Literal[32, 16] = 32
    """Bits of each float32 or float64 that is left untouched (biases, norms, buffers, excluded
    weights), in the file alone: 16: float16."""
    merge_norms: bool = False
    """Leave the running statistics of BatchNorm out of the file, whose weights and biases then hold
    them: two numbers for each channel in place of four, for evaluation."""
    seed: int = 0
    """Everything random derives from it."""
    include: tuple[str, ...] = ("*",)
    """Glob patterns of the tensors or modules to compress."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of the tensors or modules to leave untouched."""
    min_size: Natural = 0
    """Tensors with fewer elements are left untouched."""
    structured: Structured = "keep"
    """Tensors whose initial values are constant, or plainly not noise around zero: `keep` leaves
    them untouched unless `include` names them, `share` treats them like all others."""

    name: ClassVar[str]
    _ignored: ClassVar[tuple[str, ...]] = ()
    """What this one was asked for in vain."""
    ratios: ClassVar[Ratios] = "any"
    """Which ratios it reaches: any, to a value or two per tensor; the nearest that the steps of its
    ranks or widths allow; the nearest of few, which numbers of layers give; or one, the model's and
    its own, whatever is asked for: `ratio` and `budget_bytes` then become `None`, which `compress`
    warns of."""
    default_ratio: ClassVar[float] = DEFAULT_RATIO
    """Where neither ratio nor bytes are given."""
    changes_shapes: ClassVar[bool] = False
    """Whether untouched tensors may be smaller than in the dense model."""
    initialises: ClassVar[bool] = False
    """Whether it takes models on the meta device and lets them initialise themselves."""
    moves_weights: ClassVar[bool] = False
    """Whether a value may belong to another weight later in the training: then averages of
    parameters mean nothing."""

    trains_matrices: ClassVar[bool] = False
    """Whether what it trains are matrices, or entries of one each (`Compression.entries`)."""

    unshardable: ClassVar[str | None] = (
        "it looks at whole weights between two steps; use trainer=ddp"
    )
    """Why no process can hold a share of its parameters (FSDP) and what to do; `None` where each
    can, because it needs the whole of none but where a layer computes with it."""

    parametrised: ClassVar[Parametrised] = "none"
    """Which weights it takes that others are computed from; see `check_parametrised`."""

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
        """Check the options: what their annotations say, and what several have in common.

        Raises:
            InputError: One is of another type or out of range; `ratio` and `budget_bytes` are both
                given.
        """
        check_fields(self, "compression.", bare=("ratio", "budget_bytes", "seed"))
        self._check_train_bits()
        _ = self.packing
        if self.ratio is not None and self.budget_bytes is not None:
            raise InputError(
                f"ratio={self.ratio} and budget_bytes={self.budget_bytes} are both given; "
                "set one of them and leave the other null"
            )
        if self.ratios == "one":
            asked = {"ratio": self.ratio, "budget_bytes": self.budget_bytes}
            ignored = [f"{k}={v}" for k, v in asked.items() if v is not None and (k, v) != _ALL]
            object.__setattr__(self, "_ignored", tuple(ignored))
            for key in asked:
                object.__setattr__(self, key, None)

    @property
    def ties_untouched(self) -> bool:
        """Whether tensors that it leaves untouched otherwise become one."""
        return False

    @property
    def takes_biases(self) -> bool:
        """Whether it compresses the biases of layers like their weights."""
        return False

    @property
    def stored(self) -> "Strategy":
        """The strategy of a network that is loaded from a file of this one."""
        return self

    @property
    def packing(self) -> Packing:
        """How an artifact stores the learned values."""
        return Packing(self.bits, self.block_size, self.coding)

    def untouched_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the file holds an untouched tensor of this one."""
        is_wide = dtype in (torch.float32, torch.float64)
        return torch.float16 if self.untouched_bits == 16 and is_wide else dtype

    @property
    def is_lossy(self) -> bool:
        """Whether the artifact holds other numbers than the trained model."""
        return self.bits != 32 or self.untouched_bits != 32 or self.merge_norms

    def _check_train_bits(self) -> None:
        if self.train_bits is None:
            return
        if self.train_bits not in BITS or self.train_bits == 32:
            allowed = ", ".join(map(str, BITS[1:]))
            raise InputError(
                f"artifact.train_bits must be null or one of {allowed}, got {self.train_bits!r}"
            )
        if self.bits not in (32, self.train_bits):
            raise InputError(
                f"artifact.bits={self.bits} with artifact.train_bits={self.train_bits}: what the "
                "training computes with is what the artifact holds; leave artifact.bits out"
            )
        object.__setattr__(self, "bits", self.train_bits)

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
        """Rewrite `model` in place; but for `context.start`, it is unchanged when this raises.

        Raises:
            InputError: The model cannot be compressed with these options.
        """
        for asked in self._ignored:
            warn(f"compression={self.name} ignores {asked}: it has one ratio", stacklevel=3)
        candidates = self._select(model)
        structured = self._structured(model, candidates)
        if len(structured) == len(candidates):
            if self.ratios != "one":
                raise InputError(
                    "nothing is left to compress: the initial values of "
                    f"{sample_names(sorted(structured))} are constant or no noise around zero; "
                    "name tensors in compression.include, or set compression.structured=share"
                )
            structured = frozenset()  # it compresses nothing
        weights = tuple(weight for weight in candidates if weight.name not in structured)
        check_state_names(model, weights)
        check_parametrised(weights, self.parametrised)
        check_memory(model, weights)
        if context.start is not None:
            context.start(model)
        compression = self.build(model, weights, context)
        compression.structured = tuple(w.name for w in candidates if w.name in structured)
        set_compression(model, compression)
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
                ignored, and so are values that stay where the dense model has them.

        Raises:
            InputError: A weight or tensor is missing or does not fit.
        """
        check_not_compressed(model)
        weights = named_weights(model, names)
        compression = self.stored.rebuild(model, weights, num_values, tensors)
        set_compression(model, compression)
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

    @property
    def asked_ratio(self) -> float:
        """`ratio`, or the default."""
        return self.default_ratio if self.ratio is None else self.ratio

    @property
    def requested_ratio(self) -> float | None:
        """`asked_ratio`; `None` where bytes are asked for, or where there is only one ratio."""
        return None if self.ratios == "one" or self.budget_bytes is not None else self.asked_ratio

    def target_values(self, weights: Sequence[CompressibleWeight]) -> int:
        """Return how many learned values `ratio` allows: the nearest whole number, at least 1."""
        return max(1, round(self.asked_ratio * sum(weight.numel for weight in weights)))

    def _select(self, model: nn.Module) -> tuple[CompressibleWeight, ...]:
        check_not_compressed(model)
        if type(model).__name__ == "OptimizedModule":
            raise InputError("the model is compiled: compress it first, then torch.compile it")
        weights = select_weights(
            model,
            include=self.include,
            exclude=self.exclude,
            min_size=self.min_size,
            biases=self.takes_biases,
        )
        for weight in weights:
            if not weight.tensor.is_meta and not _is_finite(weight.tensor.detach()):
                raise InputError(f"{weight.name} has initial weights that are not finite")
        return weights

    def _structured(
        self, model: nn.Module, weights: Sequence[CompressibleWeight]
    ) -> frozenset[str]:
        if not self.initialises:
            check_has_values(model)
        if self.structured == "share":
            return frozenset()
        unnamed = [w for w in weights if not w.is_bias and not is_named(w, self.include)]
        return structured_weights(model, unnamed)


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


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, without a copy of them: the extremes of a NaN are NaN."""
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
