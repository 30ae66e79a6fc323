"""What the inputs of layers are like: the second moments that a fit of their outputs needs."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memfold.compression.samples import Batch
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError

__all__ = ["input_moments", "moments_at"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SAMPLES_AT_ONCE = 16
"""Of a convolution, whose patches take more memory than its inputs."""


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
    for owner in (owner for weight in weights for owner in weight.owners):
        if not isinstance(owner.module, nn.Linear):
            raise InputError(
                f"{owner.name} is of {type(owner.module).__name__}: moments of inputs are "
                "those of torch.nn.Linear; leave it out with compression.exclude"
            )
    modules = {owner.module for weight in weights for owner in weight.owners}
    found = moments_at(model, modules, samples)
    moments = []
    for weight in weights:
        own = [found[owner.module][0] for owner in weight.owners if owner.module in found]
        if not own:
            raise InputError(f"no sample reaches {weight.name}: leave it out")
        moments.append(torch.stack(own).sum(0))
    return moments


def moments_at(
    model: nn.Module, modules: Collection[nn.Module], samples: Iterable[Batch]
) -> dict[nn.Module, Tensor]:
    """Sum X'X over all inputs of linear layers and, patch by patch, of convolutions.

    The model runs in evaluation mode; modes, buffers and random generators stay as they are.

    Args:
        model: The root module, with its dense weights.
        modules: At least one `torch.nn.Linear`, `Conv1d`, `Conv2d` or `Conv3d`.
        samples: Batches of (input, target), read once, to their end.

    Returns:
        For each module that a sample reaches float64, shape (groups, columns, columns), on the CPU;
        a linear layer is one group, and the columns are those of the weight behind its first
        dimension.
    """
    moments: dict[nn.Module, Tensor] = {}
    hook = partial(_add, moments)
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    like = next(iter(modules)).weight
    assert isinstance(like, Tensor)
    try:
        with _evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for inputs, _ in samples:
                model(inputs.to(like.device, like.dtype if inputs.is_floating_point() else None))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _add(
    moments: dict[nn.Module, Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    (inputs,) = (*args, *kwargs.values())
    for rows in _rows(module, inputs):
        product = (rows.mT @ rows).cpu()
        moments[module] = moments[module] + product if module in moments else product


def _rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Yield what the weight multiplies, float64 (groups, rows, columns)."""
    if not isinstance(module, _CONVOLUTIONS):
        yield inputs.reshape(1, -1, inputs.shape[-1]).double()
        return
    num_places = len(module.kernel_size)
    columns = module.weight[0].numel()
    # A convolution whose output channels are the entries of a patch knows padding, stride, groups.
    unit = torch.eye(columns, dtype=torch.float64, device=inputs.device)
    kernel = unit.view(columns, *module.weight.shape[1:]).repeat(
        module.groups, 1, *(1 for _ in range(num_places))
    )
    batched = inputs if inputs.dim() == num_places + 2 else inputs.unsqueeze(0)
    for part in batched.double().split(_SAMPLES_AT_ONCE):
        patches = module._conv_forward(part, kernel, None)  # type: ignore[arg-type]
        yield patches.movedim(1, -1).reshape(-1, module.groups, columns).transpose(0, 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
