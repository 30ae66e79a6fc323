"""Which tensors of a model can be compressed, whatever module owns them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from memfold.compression.accounting import extent, storage_key
from memfold.errors import InputError

__all__ = [
    "CompressibleWeight",
    "Owner",
    "check_memory",
    "check_state_names",
    "is_bias",
    "is_bias_or_norm",
    "is_named",
    "named_weights",
    "padding_row_of",
    "plain_tensors",
    "sample_names",
    "select_weights",
    "zero_row_of",
]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Owner:
    """One place where a tensor is registered: `module._parameters[attribute]`."""

    module: nn.Module
    attribute: str
    path: str
    """Name of the module inside the model, "" for the model itself."""

    @property
    def name(self) -> str:
        """State-dict name of the tensor at this place."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


@dataclass(frozen=True)
class CompressibleWeight:
    """A tensor with two or more dimensions, or a bias that is compressed like one.

    A tied tensor is one weight with several owners.
    """

    owners: tuple[Owner, ...]
    shape: torch.Size

    @property
    def name(self) -> str:
        """State-dict name at the first owner, in registration order."""
        return self.owners[0].name

    @property
    def numel(self) -> int:
        """Number of weights in the tensor."""
        return prod(self.shape)

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a layer."""
        return is_bias(self.owners[0].attribute)

    @property
    def beside(self) -> nn.Parameter | None:
        """The weight of the layer whose bias this is, if a layer that owns it has one."""
        found = (
            o.module._parameters.get(o.attribute.replace("bias", "weight")) for o in self.owners
        )
        return next((weight for weight in found if weight is not None), None)

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means its name at an owner, or a module around it."""
        for owner in self.owners:
            parts = owner.name.split(".")
            if any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1)):
                return True
        return False

    @property
    def tensor(self) -> nn.Parameter:
        """The dense parameter, as long as the model still holds it."""
        return self.owners[0].module._parameters[self.owners[0].attribute]  # type: ignore[return-value]


def select_weights(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    min_size: int = 0,
    biases: bool = False,
) -> tuple[CompressibleWeight, ...]:
    """List the compressible weights of `model` in registration order.

    A weight is compressible when it has at least two dimensions, a real floating dtype and
    requires a gradient, and is neither a bias nor a norm's parameter; frozen tensors stay
    untouched. Patterns are shell globs, matched against the tensor's state-dict name
    (`layer1.0.conv1.weight`) and every module around it (`layer1.0.conv1`, `layer1.0`, `layer1`).

    Args:
        model: Any module; tensors are found by parameter, not by layer class.
        include: Keep a weight when one of these patterns matches one of its owners.
        exclude: Leave a weight untouched when one of these patterns matches one of its owners.
        min_size: Leave weights with fewer elements untouched.
        biases: Take the biases of layers too, but not those of norms.

    Raises:
        InputError: An include pattern matches nothing, nothing is left to compress, the model has
            parameters that do not exist yet (lazy modules).
    """
    weights = tuple(w for w in _weights(model, biases) if w.tensor.requires_grad)
    if not weights:
        raise InputError(
            f"{type(model).__name__} has no compressible weights: no trainable floating-point "
            "tensor with two or more dimensions"
        )
    for pattern in include:
        if not any(weight.matches(pattern) for weight in weights):
            raise InputError(
                f"compression.include={pattern!r} matches no compressible weight; "
                f"this model has {_sample(weights)}"
            )
    for pattern in exclude:
        if not any(weight.matches(pattern) for weight in weights):
            warn(
                f"compression.exclude={pattern!r} matches no compressible weight; "
                f"this model has {_sample(weights)}",
                stacklevel=2,
            )
    chosen = tuple(
        weight
        for weight in weights
        if any(weight.matches(pattern) for pattern in include)
        and not any(weight.matches(pattern) for pattern in exclude)
        and weight.numel >= min_size
    )
    if not chosen:
        raise InputError(
            f"compression.include={list(include)}, compression.exclude={list(exclude)} and "
            f"compression.min_size={min_size} leave nothing to compress; "
            f"this model has {_sample(weights)}"
        )
    return chosen


def is_named(weight: CompressibleWeight, include: Sequence[str]) -> bool:
    """Whether an include pattern means this very tensor: it matches its name, or its layer's.

    Patterns that end in a part that is all wildcard (`*`, `blocks.*`) mean no tensor in particular.
    """
    patterns = [pattern for pattern in include if pattern.rpartition(".")[2] != "*"]
    names = {name for owner in weight.owners for name in (owner.name, owner.path)}
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def named_weights(model: nn.Module, names: Sequence[str]) -> tuple[CompressibleWeight, ...]:
    """Find the weights with these state-dict names, frozen or not, in the order of the names.

    Biases of layers count as weights here.

    Raises:
        InputError: A name is missing, or is no compressible weight's first name.
    """
    found = {weight.name: weight for weight in _weights(model, biases=True)}
    for name in names:
        if name not in found:
            raise InputError(f"the model has no compressible weight {name}; it has {list(found)}")
    return tuple(found[name] for name in names)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in plain attributes of modules, and in lists and dicts there, by name."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name == "_flat_weights" and isinstance(module, nn.RNNBase):
                continue
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = value.values() if isinstance(value, dict) else value
            for item in items if isinstance(value, dict | list | tuple | set) else [value]:
                if isinstance(item, Tensor):
                    yield prefix + name, item


def _weights(model: nn.Module, biases: bool) -> Iterator[CompressibleWeight]:
    """Yield every tensor that is a weight by its kind; tied ones share memory, object or not."""
    owners: dict[tuple[object, ...], list[Owner]] = {}
    for path, module in model.named_modules():
        for attribute, tensor in module._parameters.items():
            if tensor is None:
                continue
            owner = Owner(module, attribute, path)
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise InputError(
                    f"{owner.name} is a lazy parameter without a shape; "
                    "run one batch through the model before compressing it"
                )
            least = 1 if biases and is_bias(attribute) else 2
            if tensor.dim() >= least and tensor.is_floating_point() and tensor.numel() > 0:
                owners.setdefault(storage_key(tensor), []).append(owner)
    for places in owners.values():
        kept = _is_norm if biases and all(is_bias(o.attribute) for o in places) else is_bias_or_norm
        if not any(kept(owner) for owner in places):
            first = places[0].module._parameters[places[0].attribute]
            assert first is not None
            yield CompressibleWeight(tuple(places), first.shape)


def is_bias_or_norm(owner: Owner) -> bool:
    """Whether a parameter is a bias by its name, or belongs to a norm: then it is no weight."""
    return is_bias(owner.attribute) or _is_norm(owner) or _is_magnitude(owner)


def is_bias(attribute: str) -> bool:
    """Whether a parameter is a bias by its name."""
    return attribute.startswith("bias") or attribute.endswith("bias")


def _is_norm(owner: Owner) -> bool:
    return isinstance(owner.module, _NORMS)


def _is_magnitude(owner: Owner) -> bool:
    """Whether weight norm, in its old or its new form, multiplies directions with this tensor."""
    module, name = owner.module, owner.attribute
    if isinstance(module, ParametrizationList):
        return name == "original0" and hasattr(module, "original1")
    return name.endswith("_g") and f"{name[:-2]}_v" in module._parameters


def padding_row_of(weight: CompressibleWeight) -> int | None:
    """Row of an embedding that is padding, unless a tied layer trains it."""
    module = weight.owners[0].module
    if len(weight.owners) > 1 or not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    return module.padding_idx


def zero_row_of(weight: CompressibleWeight) -> int | None:
    """Row of an embedding that stays zero: `padding_row_of`; warn where it has values."""
    row = padding_row_of(weight)
    if row is not None and not weight.tensor.is_meta and bool(weight.tensor.detach()[row].any()):
        warn(
            f"{weight.name}: the padding row {row} is not zero and cannot be kept; it becomes zero",
            stacklevel=2,
        )
    return row


def check_state_names(model: nn.Module, chosen: Sequence[CompressibleWeight]) -> None:
    """Check that the model's state dict calls the chosen weights by the names of their places.

    Raises:
        InputError: It has other names, or leaves one out.
    """
    state = model.state_dict(keep_vars=True)
    for owner in (owner for weight in chosen for owner in weight.owners):
        if owner.name not in state:
            raise InputError(
                f"{owner.name} is not in the model's state dict: a wrapper or a hook renames it; "
                "compress the model inside before it is wrapped"
            )


def check_memory(model: nn.Module, chosen: Sequence[CompressibleWeight]) -> None:
    """Check that nothing else in the model holds the memory of the chosen weights.

    Raises:
        InputError: Something does, or they overlap.
    """
    places: dict[int, list[tuple[int, int, str]]] = {}
    for weight in chosen:
        storage, first, last = extent(weight.tensor)
        places.setdefault(storage, []).append((first, last, weight.name))
    owned = {owner.name for weight in chosen for owner in weight.owners}
    for name, tensor in _held_tensors(model):
        storage, first, last = extent(tensor)
        for begin, end, weight_name in places.get(storage, []):
            if name not in owned and first <= end and begin <= last:
                raise InputError(
                    f"{name} holds the memory of {weight_name}, and would go on using the dense "
                    f"weight: remove it, or add {weight_name} to compression.exclude"
                )
    for ranges in places.values():
        ranges.sort()
        for (_, end, name), (begin, _, other) in pairwise(ranges):
            if begin <= end:
                raise InputError(f"{name} and {other} overlap in memory; exclude one of them")


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers, and what `plain_tensors` finds, with a name."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield prefix + name, tensor
    yield from plain_tensors(model)


def _sample(weights: Sequence[CompressibleWeight]) -> str:
    return sample_names([weight.name for weight in weights])


def sample_names(names: Sequence[str]) -> str:
    """Name the first few, and say how many there are."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
