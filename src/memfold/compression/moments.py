"""What the inputs of layers are like: the second moments that a fit of their outputs needs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memfold.compression.samples import Batch
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError

__all__ = ["input_moments"]


def input_moments(
    model: nn.Module, weights: Sequence[CompressibleWeight], samples: Sequence[Batch]
) -> list[Tensor]:
    """Sum X'X over all inputs of each weight, where the weight multiplies: y = x W'.

    The model runs in evaluation mode; modes, buffers and random generators stay as they are.

    Args:
        model: The root module, with its dense weights.
        weights: Of `torch.nn.Linear` layers.
        samples: See `memfold.compression.samples.take_batches`.

    Returns:
        For each weight float64, shape (columns, columns), on the CPU.

    Raises:
        InputError: A weight is not one of a linear layer, or no sample reaches it.
    """
    moments: dict[int, Tensor] = {}
    handles = []
    for index, weight in enumerate(weights):
        for owner in weight.owners:
            if not isinstance(owner.module, nn.Linear):
                raise InputError(
                    f"{owner.name} is of {type(owner.module).__name__}: moments of inputs are "
                    "those of torch.nn.Linear; leave it out with compression.exclude"
                )
            hook = partial(_add, moments, index)
            handles.append(owner.module.register_forward_pre_hook(hook))
    like = weights[0].tensor
    try:
        with _evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for inputs, _ in samples:
                model(inputs.to(like.device, like.dtype if inputs.is_floating_point() else None))
    finally:
        for handle in handles:
            handle.remove()
    for index, weight in enumerate(weights):
        if index not in moments:
            raise InputError(f"no sample reaches {weight.name}: leave it out")
    return [moments[index] for index in range(len(weights))]


def _add(moments: dict[int, Tensor], index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    del module
    rows = args[0].flatten(0, -2).double()
    product = (rows.T @ rows).cpu()
    moments[index] = moments[index] + product if index in moments else product


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
