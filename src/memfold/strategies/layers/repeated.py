"""The repeated layers of a model, found by their structure, and the weights that they share."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from memfold.compression.selection import CompressibleWeight, sample_names
from memfold.errors import InputError

__all__ = ["Layers", "Stack", "repeated_layers", "stack_of"]

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Stack:
    """Layers of equal shapes, in the order in which the model holds them."""

    paths: tuple[str, ...]
    """Of the layers."""
    weights: Mapping[str, tuple[int, ...]]
    """Name of a weight inside a layer -> its number in the model, layer by layer."""
    shapes: Mapping[str, torch.Size]
    """Of each of these."""

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Layers:
    """What a layer strategy is given. It holds dense weights: let it go once they are replaced."""

    model: nn.Module
    """The root module."""
    weights: tuple[CompressibleWeight, ...]
    """All compressible ones, of repeated layers or not."""
    stack: Stack


def repeated_layers(model: nn.Module, pattern: str | None) -> dict[str, nn.Module]:
    """Find the layers that repeat each other: path -> module, in order.

    Args:
        model: The root module.
        pattern: A shell glob for their paths, whose `*` stays between two dots; `None` takes the
            longest list of modules of one class whose parameters have the same names and shapes,
            the one with more parameters if two are as long. Lists inside such a layer are left
            out.

    Raises:
        InputError: There are no two, or those that are named differ.
    """
    if pattern is not None:
        return _named_layers(model, pattern)
    found: list[dict[str, nn.Module]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{layer}.") for layers in found for layer in layers):
            continue
        alike: dict[tuple[type, _Shapes], dict[str, nn.Module]] = defaultdict(dict)
        for name, child in module.named_children():
            alike[type(child), _shapes(child)][f"{path}.{name}" if path else name] = child
        found += [
            layers
            for (_, shapes), layers in alike.items()
            if len(layers) > 1 and any(len(shape) > 1 for _, shape in shapes)
        ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no repeated layers, no two modules of a class side by "
            "side with parameters of the same shapes; equal ones that lie apart can be named: "
            "compression.layers='*.encoder'"
        )
    return max(found, key=lambda layers: (len(layers), _size(next(iter(layers.values())))))


def stack_of(model: nn.Module, weights: Sequence[CompressibleWeight], pattern: str | None) -> Stack:
    """Find the weights that every repeated layer has.

    Args:
        model: The root module.
        weights: Compressible ones of it.
        pattern: See `repeated_layers`.

    Raises:
        InputError: There are no repeated layers or no such weights, or one is tied to another.
    """
    layers = repeated_layers(model, pattern)
    places = {path: number for number, path in enumerate(layers)}
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for index, weight in enumerate(weights):
        for owner in weight.owners:
            parts = owner.name.split(".")
            for end in range(1, len(parts)):
                layer = places.get(".".join(parts[:end]))
                if layer is None:
                    continue
                if len(weight.owners) > 1:
                    tied = ", ".join(owner.name for owner in weight.owners)
                    raise InputError(f"{tied} are one tensor: repeated layers cannot hold it")
                found[".".join(parts[end:])][layer] = index
    common = {
        name: tuple(numbers[layer] for layer in range(len(layers)))
        for name, numbers in found.items()
        if len(numbers) == len(layers)
    }
    if not common:
        raise InputError(
            f"the repeated layers ({sample_names(list(layers))}) have no compressible weight that "
            "each of them has (frozen ones are none): see compression.include, exclude and min_size"
        )
    shapes = {name: weights[numbers[0]].shape for name, numbers in common.items()}
    return Stack(tuple(layers), common, shapes)


def _named_layers(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    dots = pattern.count(".")
    layers = {
        path: module
        for path, module in model.named_modules()
        if path and path.count(".") == dots and fnmatchcase(path, pattern)
    }
    if len(layers) < 2:
        raise InputError(
            f"compression.layers={pattern!r} names {len(layers)} modules, at least 2 are needed; "
            f"this model has {sample_names([path for path, _ in model.named_modules() if path])}"
        )
    first, *others = layers
    for path in others:
        if _shapes(layers[path]) != _shapes(layers[first]):
            raise InputError(
                f"compression.layers={pattern!r}: {first} and {path} have parameters of other "
                "names or shapes, only equal layers can share"
            )
    return layers


def _shapes(layer: nn.Module) -> _Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())


def _size(layer: nn.Module) -> int:
    return sum(tensor.numel() for tensor in layer.parameters())
