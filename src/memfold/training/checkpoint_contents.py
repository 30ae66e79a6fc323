"""What a checkpoint has to hold, and of what kinds; Lightning takes what is missing for nothing.

A checkpoint without the state of the optimizer, or of a loop, would be resumed without a word and
end with other weights.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memfold.errors import InputError

__all__ = ["check_kinds", "check_resumable"]

_PROGRESS = (
    "epoch_progress",
    "epoch_loop.batch_progress",
    "epoch_loop.scheduler_progress",
    "epoch_loop.automatic_optimization.optim_progress",
)
"""What Lightning counts in a training, as it calls that in a checkpoint."""
_AVERAGES = ("betas", "momentum", "alpha", "rho")
"""Options of PyTorch's optimizers that keep an average of gradients where these are not 0."""


def check_kinds(path: Path, checkpoint: Mapping[Any, Any]) -> None:
    """Check what every reader of a checkpoint looks at.

    Raises:
        InputError: An entry is of another kind than training writes.
    """
    import torch

    state, place = checkpoint["state_dict"], checkpoint.get("round", {})
    fit = _entry(_entry(checkpoint, "loops"), "fit_loop")
    loaders = _entry(fit, "state_dict").get("combined_loader", [])
    kinds = {
        "state_dict": isinstance(state, Mapping)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()),
        "global_step": _is_count(checkpoint["global_step"]),
        "epoch": _is_count(checkpoint["epoch"]),
        "teacher": isinstance(checkpoint.get("teacher"), str | None),
        "round": isinstance(place, dict)
        and _is_count(place.get("number", 0))
        and isinstance(place.get("max_epochs"), int | None),
        "loops": isinstance(loaders, list) and all(isinstance(loader, dict) for loader in loaders),
    }
    _refuse_first(path, (name for name, is_right in kinds.items() if not is_right))


def check_resumable(path: Path, checkpoint: Mapping[Any, Any]) -> None:
    """Check that training can go on from a checkpoint of one optimizer, after `check_kinds`.

    Raises:
        InputError: The optimizer's state, a schedule's or a loop's is missing or of another kind.
    """
    optimizers = checkpoint.get("optimizer_states")
    schedules, callbacks = checkpoint.get("lr_schedulers"), checkpoint.get("callbacks")
    fit = _entry(_entry(checkpoint, "loops"), "fit_loop")
    is_optimizer = (
        isinstance(optimizers, list)
        and len(optimizers) == 1
        and _is_optimizer(optimizers[0], has_stepped=checkpoint["global_step"] > 0)
    )
    kinds = {
        "optimizer_states": is_optimizer,
        "lr_schedulers": isinstance(schedules, list)
        and all(isinstance(schedule, dict) for schedule in schedules)
        and (len(schedules) > 0 or not (is_optimizer and _has_schedule(optimizers))),
        "callbacks": isinstance(callbacks, dict)
        and all(isinstance(name, str) for name in callbacks)
        and all(isinstance(state, dict) for state in callbacks.values()),
        "loops": all(name in fit and _is_progress(fit[name]) for name in _PROGRESS),
    }
    _refuse_first(path, (name for name, is_right in kinds.items() if not is_right))


def _refuse_first(path: Path, wrong: Iterable[str]) -> None:
    for name in wrong:
        raise InputError(
            f"resume: {path} is damaged: its {name} is incomplete or not what training writes; "
            "start a new run"
        )


def _entry(parent: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    found = parent.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_optimizer(state: object, *, has_stepped: bool) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not groups:
        return False
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        return False
    # Plain SGD keeps nothing.
    keeps_averages = any(group.get(name) for group in groups for name in _AVERAGES)
    return bool(state["state"]) or not keeps_averages or not has_stepped


def _has_schedule(optimizers: Any) -> bool:
    """Whether an optimizer with a valid state has the mark that PyTorch's schedules leave."""
    return any("initial_lr" in g for state in optimizers for g in state["param_groups"])


def _is_progress(value: object) -> bool:
    """Whether a tree holds counts and flags alone."""
    if isinstance(value, dict):
        return bool(value) and all(_is_progress(item) for item in value.values())
    return isinstance(value, bool) or _is_count(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
