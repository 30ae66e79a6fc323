"""Gradient clipping whose threshold means the same at every ratio."""

import torch
from torch import Tensor, nn

from memfold.compression.state import compression_of
from memfold.errors import InputError

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip all gradients of a model together, as `torch.nn.utils.clip_grad_norm_` does.

    The gradient of a number that stands for many weights counts with all of them: its length is
    that of the step that the dense weights would take. The gradient of a shared vector itself is
    sqrt(n/m) shorter, and a threshold for it would be looser the stronger weights are shared.

    Args:
        model: Compressed, around a compressed one, or dense.
        max_norm: Longest gradient that is left as it is.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        InputError: `max_norm` is not above 0, or the model holds several compressed ones.
    """
    if not max_norm > 0:
        raise InputError(f"max_norm must be above 0, got {max_norm!r}")
    compression = compression_of(model)
    parameters, gradients = [], []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            reach = None if compression is None else compression.reach(parameter)
            parameters.append(parameter)
            gradients.append(gradient if reach is None else gradient * reach)
    total = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total
