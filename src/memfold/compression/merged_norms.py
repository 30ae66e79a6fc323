"""BatchNorm as an evaluation sees it: two numbers for each channel, where training keeps four.

    w (x - mean) / sqrt(var + eps) + b  =  s x + t,    s = w / sqrt(var + eps),  t = b - s mean

A file holds s and t as weight and bias, and no running statistics: those of the model that reads it
are then mean 0 and var 1 - eps, with which s and t are what it computes with.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from memfold.compression.accounting import ties_of

__all__ = ["left_out", "merge", "separate"]

_TRAINED = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def left_out(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Name the running statistics that a file with merged norms leaves out.

    Args:
        model: The root module.
        names: Of the untouched tensors. A norm is merged where all that it has is among them: not
            one without weights or statistics, nor one that shares a tensor with another.
    """
    norms = _norms(model, names, (*_TRAINED, *_STATISTICS))
    return frozenset(prefix + name for prefix, _ in norms for name in _STATISTICS)


def merge(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return untouched tensors with merged norms, without what is left out; the model stays."""
    merged = dict(tensors)
    for prefix, norm in _norms(model, tensors, (*_TRAINED, *_STATISTICS)):
        weight, bias = (merged[prefix + name].detach() for name in _TRAINED)
        mean, var, _ = (merged.pop(prefix + name).double() for name in _STATISTICS)
        scale = weight.double() / (var + norm.eps).sqrt()
        merged[f"{prefix}weight"] = scale.to(weight.dtype)
        merged[f"{prefix}bias"] = (bias.double() - scale * mean).to(bias.dtype)
    return merged


def separate(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors, with the statistics that belong to merged norms.

    Args:
        model: The dense model, as yet without the file's values.
        tensors: Of the file; those of norms that were not merged have statistics.
    """
    whole = dict(tensors)
    for prefix, norm in _norms(model, tensors, _TRAINED):
        mean, var, count = (prefix + name for name in _STATISTICS)
        if norm.track_running_stats and tensors.keys().isdisjoint((mean, var, count)):
            # The default device may be meta.
            zeros = torch.zeros(tensors[f"{prefix}bias"].shape, device="cpu")
            seen = torch.tensor(0, device="cpu")
            whole |= {mean: zeros, var: zeros + (1 - norm.eps), count: seen}
    return whole


def _norms(
    model: nn.Module, names: Iterable[str], needed: Collection[str]
) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    names, shared = set(names), set(ties_of(model).values())
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + name for name in needed}
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and own.issubset(names) and own.isdisjoint(shared):
            yield prefix, module
