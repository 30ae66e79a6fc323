"""The callbacks that the configuration names: built, and checked before anything is trained."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from memfold.errors import InputError
from memfold.tasks import Task
from memfold.training.instantiate import instantiate

__all__ = ["build_callbacks", "refuse_wrong_monitors"]

_LIBRARIES = ("memfold.", "lightning.")
_REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "schedules and structure updates count on as many optimizer "
    "steps in every epoch; use trainer.accumulate_grad_batches",
    StochasticWeightAveraging: "it takes the place of scheduler=, trains an epoch more, and "
    "changes the weights after they have been validated",
    WeightAveraging: "a run that is resumed could not tell its averages from what it trains; "
    "callbacks=ema averages, and a resumed run goes on with both",
    LearningRateFinder: "the run would have another learning rate than its configuration says; "
    "scripts/tune.py chooses optimizer.lr",
    BatchSizeFinder: "the run would have another batch size than its configuration says; set "
    "data.batch_size",
}


def build_callbacks(options: Mapping[str, Any], task: Task) -> list[Callback]:
    """Build the callbacks of the group `callbacks`.

    Args:
        options: Name -> what describes a callback, or null for none. What monitors `primary`
            monitors the task's primary metric on the validation split; a `mode` of null is that
            in which the metric gets better.
        task: What the run learns.

    Raises:
        InputError: One is no callback, refuses its options, or does what a run cannot follow.
    """
    callbacks: list[Callback] = []
    for name, value in options.items():
        key = f"callbacks.{name}"
        if value is None:
            continue
        if not isinstance(value, dict):
            raise InputError(
                f"{key} must be a callback, described with {key}._target_, or null, got {value!r}"
            )
        callback: Callback = instantiate(_monitoring(value, task), key, Callback)
        for kind, reason in _REFUSED.items():
            if isinstance(callback, kind):
                raise InputError(f"{key}: {kind.__name__} is not for memfold's runs: {reason}")
        callbacks.append(callback)
    return callbacks


def _monitoring(options: Mapping[str, Any], task: Task) -> dict[str, Any]:
    filled = dict(options)
    if filled.get("monitor") == "primary":
        filled["monitor"] = f"val/{task.primary.name}"
    if "mode" in filled and filled["mode"] is None:
        filled["mode"] = task.directions.get(str(filled.get("monitor")), "min")
    return filled


def refuse_wrong_monitors(callbacks: Iterable[Callback], directions: Mapping[str, str]) -> None:
    """Check that what callbacks monitor is logged, and which way is better.

    Args:
        callbacks: All of the Trainer's.
        directions: What is logged -> max or min.

    Raises:
        InputError: A metric is unknown, or the mode is the other one. Other people's callbacks may
            log what nobody knows beforehand: beside them, unknown names are left to Lightning.
    """
    are_ours = all(type(c).__module__.startswith(_LIBRARIES) for c in callbacks)
    for callback in callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if monitor is None:
            continue
        better, name = directions.get(monitor), type(callback).__name__
        if better is None and are_ours:
            raise InputError(
                f"callbacks: {name} has monitor={monitor}, which is no metric; metrics: "
                f"{', '.join(directions)}"
            )
        if better is not None and mode not in (None, better):
            raise InputError(
                f"callbacks: {name} has monitor={monitor} and mode={mode}; it needs mode={better}"
            )
