"""memfold: train any network inside a memory budget.

import memfold

model = memfold.compress(model, "stable_rps", ratio=0.01)
...  # any training loop
memfold.save(model, "small.safetensors")
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from memfold import strategies
from memfold.artifact import load, save
from memfold.compression import (
    Context,
    Strategy,
    before_step,
    clip_grad_norm_,
    densify,
    extra_loss,
    release,
)
from memfold.compression.materialise import with_values
from memfold.errors import InputError
from memfold.memory import Footprint, footprint

__all__ = [
    "Footprint",
    "InputError",
    "Strategy",
    "before_step",
    "clip_grad_norm_",
    "compress",
    "densify",
    "extra_loss",
    "footprint",
    "load",
    "release",
    "save",
    "strategies",
]


@with_values()
def compress(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    ratio: float | None = None,
    budget_bytes: int | None = None,
    seed: int | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: object,
) -> nn.Module:
    """Make a model small, in place, before its optimizer (and DDP) exist.

    A model built on the meta device (`with torch.device("meta")`) has no values. Strategies that
    share weights give it some, so that a model can be trained whose dense weights fit in no
    memory: one module at a time gets memory, is initialised by its `reset_parameters` (and by the
    root's `_init_weights(module)`, as Hugging Face models have it), and its weights are measured,
    folded and dropped.

    * Modules inside come before the module around them, siblings in the order in which they are
      registered. Values are drawn from PyTorch's global generator: after the same
      `torch.manual_seed`, plain stacks of PyTorch's layers get those of the dense construction.
      What else a constructor does to its weights is lost.
    * A tied tensor gets the values of the first module that registers it. `model.to("meta")`
      unties: tie after it.
    * Tensors that have values keep them, and give the others their device. Where nothing has
      values, that is PyTorch's default device, or the CPU where the default is meta.

    Args:
        model: Any module, on any one device, in one dtype.
        strategy: A name from `strategies()`, or a built strategy with all of its options.
        ratio: Stored learned values over compressible weights, in (0, 1]; by default 0.1, or what
            the strategy has for it.
        budget_bytes: Size of the file that `save` writes, its header included, instead of `ratio`:
            it is as full as the strategy can make it, and never fuller. With `coding` what is
            stored becomes smaller than counted; the budget then is an upper bound.
        seed: Everything random derives from it; 0 by default.
        data: Batches of (input, target), for strategies that look at data.
        loss: (output, target) -> scalar, for the same.
        **options: Fields of the strategy, for example `exclude=["head"]`.

    Returns:
        The same object.

    Raises:
        InputError: Unknown strategy or option, a value out of range, or a model that the strategy
            cannot compress. The model is then unchanged, also where an initialiser raises.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if "name" in options or not isinstance(strategy, str | Strategy):
        raise InputError(f"strategy must be a name or a Strategy, got {strategy!r}")
    given = {"ratio": ratio, "budget_bytes": budget_bytes, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None} | options
    if isinstance(strategy, str):
        strategy = Strategy.from_dict({"name": strategy, **given})
    elif given:
        raise InputError(f"{', '.join(given)}: give options by name or in the strategy, not both")
    strategy.compress(model, Context(data, loss))
    return model
