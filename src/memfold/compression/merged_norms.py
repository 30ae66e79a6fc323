"""BatchNorm as an evaluation sees it: two numbers for each channel, where training keeps four.

    w (x - mean) / sqrt(var + eps) + b  =  s x + t,    s = w / sqrt(var + eps),  t = b - s mean

A file holds s and t as weight and bias, and no running statistics: those of the model that reads it
are then mean 0 and var 1 - eps, with which s and t are what it computes with.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from memfold.compression.accounting import state_tensors, ties_of

__all__ = ["merge", "merged_in", "num_merged", "separate"]

_TRAINED = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def merged_in(
    model: nn.Module, names: Collection[str], tied: Collection[str] = ()
) -> frozenset[str]:
    """Name the running statistics that a file with merged norms leaves out.

    Args:
        model: The root module.
        names: Of the untouched tensors. A norm is merged where all that it has is among them: not
            one without weights or statistics, nor one that shares a tensor with another.
        tied: Those with which others are going to be one tensor.
    """
    norms = _norms(model, names, tied)
    return frozenset(prefix + name for prefix, _ in norms for name in _STATISTICS)


def num_merged(statistics: Collection[str]) -> int:
    """Count the norms that these statistics belong to."""
    return len(statistics) // len(_STATISTICS)


def merge(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return untouched tensors with merged norms, without what is left out; the model stays."""
    merged = dict(tensors)
    for prefix, norm in _norms(model, tensors):
        weight, bias = (merged[prefix + name].detach() for name in _TRAINED)
        mean, var, _ = (merged.pop(prefix + name).double() for name in _STATISTICS)
        scale = weight.double() / (var + norm.eps).sqrt()
        merged[f"{prefix}weight"] = scale.to(weight.dtype)
        merged[f"{prefix}bias"] = (bias.double() - scale * mean).to(bias.dtype)
    return merged


def separate(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics that belong to a file's merged norms.

    Args:
        model: The dense model, as yet without the file's values.
        tensors: Of the file; those of norms that were not merged have statistics.
    """
    made: dict[str, Tensor] = {}
    for prefix, norm in _norms(model, state_tensors(model)):
        mean, var, count = statistics = [prefix + name for name in _STATISTICS]
        if f"{prefix}bias" in tensors and tensors.keys().isdisjoint(statistics):
            zeros = torch.zeros(tensors[f"{prefix}bias"].shape)
            made |= {mean: zeros, var: zeros + (1 - norm.eps), count: torch.tensor(0)}
    return made


def _norms(
    model: nn.Module, names: Iterable[str], tied: Collection[str] = ()
) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    names, shared = set(names), {*ties_of(model).values(), *tied}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + name for name in (*_TRAINED, *_STATISTICS)}
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and own.issubset(names) and own.isdisjoint(shared):
            yield prefix, module
