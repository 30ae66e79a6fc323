"""A copy of a model on which scores are computed, so that the model itself stays as it is."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memfold.compression.accounting import storage_key
from memfold.compression.parametrised import copy_model
from memfold.strategies.pruning.masks import PackedMask

__all__ = ["replicate", "reseed", "scoring_mode", "wide_dtype"]


def replicate(
    model: nn.Module,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    kept: Sequence[PackedMask] | None = None,
    training: bool = False,
) -> tuple[nn.Module, list[Tensor]]:
    """Copy a model, with gradients for some of its parameters only.

    Args:
        model: Any module; nothing in it changes.
        parameters: Dense parameters of the model, each once.
        dtype: float32 or float64: of all floating-point parameters and buffers of the copy.
        kept: What is left of the parameters in the copy, the rest being zero; `None` for all.
        training: The copy's mode, whatever that of the model and its parts is.

    Returns:
        The copy, and what stands for the parameters in it. Parameters that share memory with one
        of them are one tensor in the copy, so that its gradient is that of the tied weight.
    """
    # In their new dtype at once: a copy in the old one would be there beside it.
    twins = {id(p): nn.Parameter(p.detach().to(dtype, copy=True)) for p in parameters}
    copy = copy_model(model, dict(twins))
    tied = {storage_key(p): twins[id(p)] for p in parameters}
    for module, twin in zip(model.modules(), copy.modules(), strict=True):
        for attribute, tensor in module._parameters.items():
            if tensor is not None and storage_key(tensor) in tied:
                twin._parameters[attribute] = tied[storage_key(tensor)]
    copy = copy.double() if dtype == torch.float64 else copy.float()
    copy.train(training).requires_grad_(False)
    weights = [twins[id(p)] for p in parameters]
    for weight, mask in zip(weights, kept or (), strict=kept is not None):
        mask.fill_others(weight, 0)
    return copy, [weight.requires_grad_() for weight in weights]


@contextmanager
def scoring_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gradients on, twice differentiable kernels, no autocast; random generators stay untouched."""
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # Fused attention has no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN has no backward pass of recurrent layers in evaluation mode, and no second one.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def reseed(device: torch.device, seed: int) -> None:
    """Let dropout and other random layers draw from `seed`; for use in `scoring_mode`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def wide_dtype(model: nn.Module) -> torch.dtype:
    """Return float32, or float64 when the model has parameters of that."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return torch.float64 if torch.float64 in dtypes else torch.float32
