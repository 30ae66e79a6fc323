"""Which parameters are decayed, and which are the matrices that Muon takes."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from memfold.compression import compression_of

__all__ = ["Decay", "hidden_matrices", "parameter_groups"]

Decay = Literal["all", "matrices"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MULTIPLY = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, *_CONVOLUTIONS)


def parameter_groups(
    net: nn.Module, decay: Decay, apart: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return everything trainable, as an optimizer takes it.

    Args:
        net: Compressed already.
        decay: `all`; or `matrices`, which keeps biases, norms and embeddings free of weight decay,
            and what a module's `no_weight_decay()` names, as timm's models do.
            What stands for compressed weights is decayed as those are, whatever its shape: the
            values of an embedding are free, a vector that several weights share is not.
        apart: What stands in groups of its own, which have `apart` set.
    """
    compression = compression_of(net)
    owned = frozenset() if compression is None else compression.owned_names()
    tables = {id(p) for m in net.modules() if isinstance(m, _TABLES) for p in _own(m)}
    special = {id(p) for p in apart}
    named = tuple(_named_without_decay(net))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            is_matrix = (name in owned or parameter.dim() > 1) and id(parameter) not in tables
            is_named = any(name == one or name.startswith(f"{one}_") for one in named)
            is_free = decay == "matrices" and (is_named or not is_matrix)
            groups.setdefault((id(parameter) in special, is_free), []).append(parameter)
    return [
        {"params": parameters}
        | ({"apart": True} if is_apart else {})
        | ({"weight_decay": 0.0} if is_free else {})
        for (is_apart, is_free), parameters in sorted(groups.items(), key=_order)
    ]


def hidden_matrices(net: nn.Module, num_outputs: int) -> Iterator[nn.Parameter]:
    """Yield what stands for the matrices between the first and the last layer's outputs.

    These are the weights of linear, attention and recurrent layers as they are stored, and of
    convolutions that are not grouped, but not those of embeddings and of the last layer.

    Args:
        net: Compressed by a strategy that trains matrices.
        num_outputs: Of the last layer.
    """
    compression = compression_of(net)
    owned = frozenset() if compression is None else compression.owned_names()
    names = {id(p): name for name, p in net.named_parameters()}
    layers = [m for m in net.modules() if _multiplies(m)]
    outside = [m for m in net.modules() if isinstance(m, _TABLES)]
    outside += [m for m in layers[-1:] if _num_outputs(m) == num_outputs]
    left_out = {id(p) for module in outside for p in _own(module)}
    for layer in layers:
        for p in _own(layer):
            if id(p) not in left_out and (p.dim() > 1 or names[id(p)] in owned):
                left_out.add(id(p))
                yield p


def _order(group: tuple[tuple[bool, bool], object]) -> tuple[bool, bool]:
    """Put what is apart first, and what is decayed before what is not."""
    (is_apart, is_free), _ = group
    return not is_apart, is_free


def _named_without_decay(net: nn.Module) -> Iterator[str]:
    for prefix, module in net.named_modules():
        names: Any = getattr(module, "no_weight_decay", tuple)
        yield from (f"{prefix}.{name}" if prefix else name for name in names())


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _multiplies(module: nn.Module) -> bool:
    is_grouped = getattr(module, "groups", 1) != 1
    is_of_transformers = type(module).__name__ == "Conv1D"
    return (isinstance(module, _MULTIPLY) or is_of_transformers) and not is_grouped


def _num_outputs(module: nn.Module) -> object:
    names = ("out_features", "out_channels", "nf")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
