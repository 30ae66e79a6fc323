"""Modules whose activations are computed again in the backward pass instead of being kept."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfold.errors import InputError

__all__ = ["checkpoint_activations"]


def checkpoint_activations(net: nn.Module, pattern: str, *, compiles: bool = False) -> None:
    """Keep, of the modules that match, inputs and outputs alone, in place.

    Gradients stay the same to the bit: dropout draws the same numbers again, and the statistics of
    norms see each batch once.

    Args:
        net: Compressed already.
        pattern: Glob pattern of names of modules; of nested ones the outermost is taken.
        compiles: Whether the network runs through `torch.compile`.

    Raises:
        InputError: It matches no module that is called; or one with buffers, such as statistics
            of norms, which a compiled network would count twice.
    """
    chosen: list[str] = []
    callable_names = [n for n, m in net.named_modules() if n and _is_called(m)]
    for name in callable_names:
        is_inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if fnmatchcase(name, pattern) and not is_inside:
            chosen.append(name)
    if not chosen:
        some = ", ".join(callable_names[:12])
        raise InputError(
            f"trainer.activation_checkpointing={pattern} matches no module; modules: {some}"
            + (", ..." if len(callable_names) > 12 else "")
        )
    for name in chosen:
        module = net.get_submodule(name)
        if compiles and next(module.buffers(), None) is not None:
            raise InputError(
                f"trainer.activation_checkpointing={pattern} with trainer.compile=true: {name} has "
                "buffers, which the second pass over a batch might change; take one of the two"
            )
        module.__dict__["forward"] = partial(_forward, module, module.__dict__.get("forward"))


def _is_called(module: nn.Module) -> bool:
    """Tell a module from a mere list of some."""
    return type(module).forward is not nn.Module.forward


def _forward(module: nn.Module, own: Any, *arguments: Any, **options: Any) -> Any:
    # Looked up now: a densified copy has another class.
    forward = partial(type(module).forward, module) if own is None else own
    if not (module.training and torch.is_grad_enabled()):
        return forward(*arguments, **options)
    more = (
        {"context_fn": partial(_contexts, module)}
        if next(module.buffers(), None) is not None
        else {}
    )
    return checkpoint(forward, *arguments, use_reentrant=False, **more, **options)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager]:
    return nullcontext(), _unchanged_buffers(module)


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Keep what the second pass over a batch would count once more."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
