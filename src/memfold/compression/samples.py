"""Samples of the training set, for what looks at data while it compresses a model."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from memfold.errors import InputError

__all__ = ["Batch", "Loss", "first_input", "take_batches", "take_samples"]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def take_samples(
    strategy: str, data: Iterable[Batch] | None, loss: Loss | None, *, num_samples: int
) -> tuple[list[Batch], Loss]:
    """Return samples, and the loss that they are scored with.

    Args:
        strategy: Name of the one that asks.
        data: See `take_batches`.
        loss: (output, target) -> scalar.
        num_samples: See `take_batches`.

    Raises:
        InputError: Data or loss are missing, or the data are empty or of another form.
    """
    if data is None or not callable(loss):
        raise InputError(
            f"compression={strategy} needs batches of data and a loss: "
            "memfold.compress(..., data=..., loss=...)"
        )
    return take_batches(f"compression={strategy}", data, num_samples=num_samples), loss


def take_batches(asker: str, data: Iterable[Batch] | None, *, num_samples: int) -> list[Batch]:
    """Return the first `num_samples` samples as batches, fewer when there are no more.

    A single sample at the end joins the batch before: BatchNorm has no statistics of one.

    Args:
        asker: What needs them, for messages: `compression=basis`, or another setting.
        data: Batches of (input, target); read once, no further than needed.
        num_samples: The last batch is cut to fit.

    Raises:
        InputError: The data are missing, empty or of another form.
    """
    if data is None:
        raise InputError(f"{asker} needs batches of data: memfold.compress(..., data=...)")
    batches: list[Batch] = []
    missing = num_samples
    if missing > 0:
        with torch.random.fork_rng(devices=[]):  # a loader draws its order
            for batch in data:
                inputs, targets = _checked(asker, batch)
                batches.append((inputs[:missing], targets[:missing]))
                missing -= len(batches[-1][0])
                if missing <= 0:
                    break
    if missing == num_samples:
        raise InputError(f"{asker}: data= holds no samples")
    last = batches[-2:]
    if len(last) == 2 and len(last[1][0]) == 1 and last[0][0].shape[1:] == last[1][0].shape[1:]:
        inputs, targets = zip(*last, strict=True)
        batches[-2:] = [(torch.cat(inputs), torch.cat(targets))]
    return batches


def first_input(strategy: str, data: Iterable[Batch] | None) -> Tensor:
    """Return one input out of the first batch, shape (1, ...).

    Raises:
        InputError: There are no data, or they are of another form.
    """
    if data is None:
        raise InputError(
            f"compression={strategy} needs a batch of data for the shape of an input: "
            "memfold.compress(..., data=...)"
        )
    with torch.random.fork_rng(devices=[]):  # a loader draws its order
        for batch in data:
            inputs, _ = _checked(f"compression={strategy}", batch)
            if len(inputs):
                return inputs[:1]
    raise InputError(f"compression={strategy}: data= holds no samples")


def _checked(asker: str, batch: object) -> Batch:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.dim() > 0:
            return inputs, targets
    raise InputError(
        f"{asker}: data= must give batches (input, target) of two tensors, "
        f"got {type(batch).__name__}"
    )
