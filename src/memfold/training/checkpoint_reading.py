"""Whether training can go on from a checkpoint: what has to be in it, of which kinds and shapes.

Lightning takes what is missing for nothing: a checkpoint without the state of the optimizer, or of
a loop, would be resumed without a word and end with other weights.
"""

import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["StartingPoint", "read_checkpoint", "read_plain_values"]

_PROGRESS = (
    "epoch_progress",
    "epoch_loop.batch_progress",
    "epoch_loop.scheduler_progress",
    "epoch_loop.automatic_optimization.optim_progress",
)
"""What Lightning counts in a training, as it calls that in a checkpoint."""
_AVERAGES = ("betas", "momentum", "alpha", "rho")
"""Options of PyTorch's optimizers that keep an average of gradients where these are not 0."""


@dataclass(frozen=True)
class StartingPoint:
    """Where training starts."""

    checkpoint: Path | None = None
    """The checkpoint to resume from; `None`: the beginning."""
    step: int = 0
    """Optimizer steps done before."""
    num_epochs: int = 0
    """Epochs begun before."""
    average_decay: float | None = None
    """Of the average that its tensors are; `None` where they are what was trained."""
    teacher: str | None = None
    """Fingerprint of the teacher that the run learns from; `None` when it has none."""
    total_batch: int | None = None
    """Samples in a batch of all processes together."""
    round: int = 0
    """The round that the checkpoint is of."""
    max_epochs: int | None = None
    """Epochs of every round, where a run has several; they cannot change."""
    is_new_round: bool = False
    """Whether a later round starts here, with nothing of its own logged or saved yet."""


def read_checkpoint(
    path: Path,
    expected: Mapping[str, object],
    resizable: Collection[str] = (),
    optional: Collection[str] = (),
    *,
    resumes: bool = False,
) -> StartingPoint:
    """Check that the checkpoint at `path` is of the module with these tensors.

    Args:
        path: An existing file.
        expected: The state dict of the module that is to be resumed: name -> tensor.
        resizable: Names of tensors whose shape the checkpoint decides.
        optional: Names of tensors that checkpoints of older versions do not have.
        resumes: Whether Lightning is to go on from it, which takes more than the tensors.

    Returns:
        The checkpoint and how far it is.

    Raises:
        InputError: The file is truncated or corrupt, holds pickled objects, lacks a part, or
            belongs to another model.
    """
    checkpoint = _read_training(path)
    if resumes:
        _check_resumable(path, checkpoint)
    found = checkpoint["state_dict"]
    expected = {k: v for k, v in expected.items() if k in found or k not in optional}
    for name in sorted(expected.keys() ^ found.keys()):
        state = "lacks" if name in expected else "has the additional"
        raise InputError(
            f"resume: {path} belongs to another model: it {state} tensor {name}; "
            "resume with the backbone and compression that the run was started with"
        )
    for name, tensor in expected.items():
        shapes = [tuple(getattr(value, "shape", ())) for value in (found[name], tensor)]
        if shapes[0] != shapes[1] and name not in resizable:
            raise InputError(
                f"resume: {path} belongs to another model: {name} has shape {shapes[0]}, "
                f"this model needs {shapes[1]}"
            )
    place = checkpoint.get("round", {})
    # Checkpoints are written at the end of an epoch, before Lightning counts it.
    return StartingPoint(
        path,
        int(checkpoint["global_step"]),
        int(checkpoint["epoch"]) + 1,
        checkpoint.get("weight_average", {}).get("decay"),
        checkpoint.get("teacher"),
        _total_batch(checkpoint),
        place.get("number", 0),
        place.get("max_epochs"),
    )


def _total_batch(checkpoint: Mapping[str, Any]) -> int | None:
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    loaders = loop.get("combined_loader", [])
    return loaders[0].get("global_batch_size") if loaders else None


def read_plain_values(path: Path) -> object:
    """Read what `torch.save` has written, if it is tensors and plain values, onto the CPU.

    Raises:
        InputError: It holds pickled objects, is damaged, or is no such file.
    """
    try:
        with open_regular(path) as file:
            if file.read(1) == pickle.PROTO:
                raise pickle.UnpicklingError
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("compressed, which PyTorch's files are not")
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds pickled Python objects, which could run code; "
            "only checkpoints of tensors and plain values are loaded"
        ) from error
    except Exception as error:  # whatever zipfile and PyTorch make of a damaged file
        raise InputError(f"{path} is truncated, damaged or no checkpoint") from error


def _read_training(path: Path) -> dict[str, Any]:
    try:
        checkpoint = read_plain_values(path)
    except InputError as error:
        raise InputError(f"resume: {error}; start a new run") from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "global_step", "epoch"} <= checkpoint.keys()
    ):
        raise InputError(f"resume: {path} is no checkpoint of a training run")
    _check_kinds(path, checkpoint)
    return checkpoint


def _check_kinds(path: Path, checkpoint: Mapping[Any, Any]) -> None:
    """Check what every reader of a checkpoint looks at.

    Raises:
        InputError: An entry is of another kind than training writes.
    """
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
        "weight_average": _is_average(checkpoint.get("weight_average"), state),
        "loops": isinstance(loaders, list) and all(isinstance(loader, dict) for loader in loaders),
    }
    _refuse_first(path, (name for name, is_right in kinds.items() if not is_right))


def _check_resumable(path: Path, checkpoint: Mapping[Any, Any]) -> None:
    """Check that training can go on from a checkpoint of one optimizer, after `_check_kinds`.

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


def _is_average(value: object, averages: object) -> bool:
    """Whether there is none, or it has what training goes on with beside these averages."""
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(averages, Mapping):
        return False
    trained = value.get("trained")
    return (
        isinstance(value.get("decay"), float)
        and _is_count(value.get("num_steps"))
        and isinstance(trained, dict)
        and all(name in averages for name in trained)
        and all(getattr(t, "shape", None) == averages[name].shape for name, t in trained.items())
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
