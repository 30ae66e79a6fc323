"""Which tensors of a model can be compressed, whatever module owns them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from warnings import warn

import torch
from torch import nn

from memfold.errors import InputError

__all__ = ["CompressibleWeight", "Owner", "select_weights"]


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
    """A tensor with two or more dimensions. A tied tensor is one weight with several owners."""

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
    def tensor(self) -> nn.Parameter:
        """The dense parameter, as long as the model still holds it."""
        return self.owners[0].module._parameters[self.owners[0].attribute]  # type: ignore[return-value]


def select_weights(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    min_size: int = 0,
) -> tuple[CompressibleWeight, ...]:
    """List the compressible weights of `model` in registration order.

    A weight is compressible when it has at least two dimensions, a real floating dtype and
    requires a gradient; frozen tensors stay untouched. Patterns are shell globs, matched against
    the tensor's state-dict name (`layer1.0.conv1.weight`) and its module's (`layer1.0.conv1`).

    Args:
        model: Any module; tensors are found by parameter, not by layer class.
        include: Keep a weight when one of these patterns matches one of its owners.
        exclude: Leave a weight untouched when one of these patterns matches one of its owners.
        min_size: Leave weights with fewer elements untouched.

    Raises:
        InputError: An include pattern matches nothing, nothing is left to compress, or the model
            has parameters that do not exist yet (lazy modules).
    """
    weights = tuple(_compressible(model))
    if not weights:
        raise InputError(
            f"{type(model).__name__} has no compressible weights: no trainable floating-point "
            "tensor with two or more dimensions"
        )
    for pattern in include:
        if not any(_matches(weight, pattern) for weight in weights):
            raise InputError(
                f"compression.include={pattern!r} matches no compressible weight; "
                f"this model has {_sample(weights)}"
            )
    for pattern in exclude:
        if not any(_matches(weight, pattern) for weight in weights):
            warn(
                f"compression.exclude={pattern!r} matches no compressible weight; "
                f"this model has {_sample(weights)}",
                stacklevel=2,
            )
    chosen = tuple(
        weight
        for weight in weights
        if any(_matches(weight, pattern) for pattern in include)
        and not any(_matches(weight, pattern) for pattern in exclude)
        and weight.numel >= min_size
    )
    if not chosen:
        raise InputError(
            f"compression.include={list(include)}, compression.exclude={list(exclude)} and "
            f"compression.min_size={min_size} leave nothing to compress; "
            f"this model has {_sample(weights)}"
        )
    return chosen


def _compressible(model: nn.Module) -> Iterator[CompressibleWeight]:
    owners: dict[int, list[Owner]] = {}
    tensors: dict[int, nn.Parameter] = {}
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
            owners.setdefault(id(tensor), []).append(owner)
            tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        is_weight = tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel() > 0
        if is_weight and tensor.requires_grad:
            yield CompressibleWeight(tuple(owners[key]), tensor.shape)


def _matches(weight: CompressibleWeight, pattern: str) -> bool:
    return any(
        fnmatchcase(owner.name, pattern) or fnmatchcase(owner.path, pattern)
        for owner in weight.owners
    )


def _sample(weights: Sequence[CompressibleWeight]) -> str:
    names = [weight.name for weight in weights]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
