"""Norms and biases of repeated layers, which are no compressible weights, tied as their weights."""

from collections.abc import Sequence

from torch import nn

from memfold.compression.selection import is_bias
from memfold.strategies.layers.repeated import Stack

__all__ = ["tie_others", "untie"]

_Places = list[tuple[nn.Module, str]]


def tie_others(
    model: nn.Module, stack: Stack, entries: Sequence[int], norms: bool, biases: bool
) -> _Places:
    """Let layers with the same entry hold the parameters of the first one, but for the weights.

    Args:
        model: The root module, with its dense weights.
        stack: The layers.
        entries: Of the map, one for each.
        norms: Whether those that are no biases by their names are tied.
        biases: Whether the others are.

    Returns:
        Where another layer's parameter is now.
    """
    firsts: dict[int, nn.Module] = {}
    places: _Places = []
    for path, entry in zip(stack.paths, entries, strict=True):
        layer = model.get_submodule(path)
        first = firsts.setdefault(entry, layer)
        if first is layer:
            continue
        for name, _ in list(layer.named_parameters()):
            parent, _, attribute = name.rpartition(".")
            is_tied = biases if is_bias(attribute) else norms
            if name not in stack.weights and is_tied:
                module = layer.get_submodule(parent)
                module._parameters[attribute] = first.get_parameter(name)
                places.append((module, attribute))
    return places


def untie(places: _Places) -> None:
    """Give each place a parameter of its own, with the same values."""
    for module, attribute in places:
        shared = module._parameters[attribute]
        assert shared is not None
        own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        module._parameters[attribute] = own
