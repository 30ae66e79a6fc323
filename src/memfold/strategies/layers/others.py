"""Norms and biases of repeated layers, which are no compressible weights, tied as their weights."""

from collections.abc import Sequence

import torch
from torch import nn

from memfold.compression.selection import Owner, is_bias, is_bias_or_norm
from memfold.errors import InputError
from memfold.strategies.layers.repeated import Stack

__all__ = ["shared_names", "tie_others", "untie"]

_Places = list[tuple[nn.Module, str]]


def shared_names(model: nn.Module, stack: Stack, norms: bool, biases: bool) -> list[str]:
    """Name what repeated layers are to share beside their weights.

    Matrices that are neither norms nor biases, such as excluded ones, stay each layer's own.

    Args:
        model: The root module.
        stack: The layers.
        norms: Whether those that are no biases by their names are shared.
        biases: Whether the others are.

    Raises:
        InputError: One is frozen in some layers alone.
    """
    layers = [model.get_submodule(path) for path in stack.paths]
    names = [
        name
        for name, parameter in layers[0].named_parameters()
        if _is_tied(layers[0], name, parameter.dim(), norms, biases)
    ]
    for name in names:
        if len({layer.get_parameter(name).requires_grad for layer in layers}) > 1:
            raise InputError(
                f"{name} is frozen in some repeated layers and trained in others, which would "
                "share it: compression.norms=own compression.biases=own"
            )
    return names


def tie_others(
    model: nn.Module,
    stack: Stack,
    entries: Sequence[int],
    starts: Sequence[Sequence[int]],
    names: Sequence[str],
) -> _Places:
    """Let layers with the same entry hold the norms and biases of the first one.

    Args:
        model: The root module.
        stack: The layers.
        entries: Of the map, one for each.
        starts: For each entry, the positions of whose layers the values start as the mean.
        names: `shared_names`.

    Returns:
        Where another layer's parameter is now.
    """
    layers = [model.get_submodule(path) for path in stack.paths]
    values = [{name: layer.get_parameter(name).detach() for name in names} for layer in layers]
    means = [
        {name: torch.stack([values[place][name] for place in places]).mean(0) for name in names}
        for places in starts
    ]
    firsts: dict[int, nn.Module] = {}
    places: _Places = []
    for layer, entry in zip(layers, entries, strict=True):
        first = firsts.setdefault(entry, layer)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            module, shared = layer.get_submodule(parent), first.get_parameter(name)
            shared.detach().copy_(means[entry][name])
            if first is not layer:
                module._parameters[attribute] = shared
                places.append((module, attribute))
    return places


def untie(places: _Places) -> None:
    """Give each place a parameter of its own, with the same values."""
    for module, attribute in places:
        shared = module._parameters[attribute]
        assert shared is not None
        own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        module._parameters[attribute] = own


def _is_tied(layer: nn.Module, name: str, dim: int, norms: bool, biases: bool) -> bool:
    path, _, attribute = name.rpartition(".")
    owner = Owner(layer.get_submodule(path), attribute, path)
    if dim > 1 and not is_bias_or_norm(owner):
        return False
    return biases if is_bias(attribute) else norms
