"""Every private name of Lightning and torchmetrics that is used anywhere.

A new version of Lightning has to be read against this page alone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

__all__ = [
    "LightModule",
    "SteppedCheckpoint",
    "can_stop_early",
    "forget_computed",
    "hand_over_children",
    "has_validated",
    "ignore_sigterm",
    "last_logged_row",
    "lighten_steps",
    "logged_values",
    "raise_as_for_sigterm",
    "reductions_of",
    "release_children",
    "validates_now",
    "validates_too",
]


def release_children() -> None:
    """Keep the observer of Lightning's launcher from killing this process when a child ends.

    The children end with this process.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes.clear()


def hand_over_children(before: Trainer, after: Trainer) -> None:
    """Let `after` stop the processes that `before` has started for the other ranks."""
    old, new = before.strategy.launcher, after.strategy.launcher
    if isinstance(old, _SubprocessScriptLauncher) and isinstance(new, _SubprocessScriptLauncher):
        new.procs = old.procs


def ignore_sigterm(trainer: Trainer) -> None:
    """Switch Lightning's own handling off, before `trainer` is used.

    It starts a collective inside the signal handler, which hangs if the signal comes during
    another one; it heeds rank 0 alone; and it waits for the GPU in every step.
    """
    connector: Any = trainer._signal_connector
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    connector._sigterm_notifier_fn = epoch_loop._broadcast_sigterm_tensor = lambda *_: None


def raise_as_for_sigterm(trainer: Trainer) -> None:
    """Let Lightning raise where it has logged what it has to log."""
    connector: Any = trainer._signal_connector
    connector.received_sigterm = True


_HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def lighten_steps(trainer: Trainer) -> None:
    """Leave out of a step what does nothing: hooks that a callback leaves as they are, no profiler.

    Every hook that is called has a context of the profiler around it, some 60 in a step. Lightning
    skips a hook that cannot be called.
    """
    lightened: Any = trainer
    if type(lightened.profiler) is PassThroughProfiler:
        lightened.profiler = _NoProfiler()
    for callback in lightened.callbacks:
        for hook in _HOOKS_OF_A_STEP:
            is_own = hook in vars(callback) or getattr(type(callback), hook) is not getattr(
                Callback, hook
            )
            if not is_own:
                setattr(callback, hook, None)


class _NoProfiler(PassThroughProfiler):
    _context = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[Any]:
        return self._context


class LightModule(LightningModule):
    """A LightningModule that takes note of the hook it is in at the cost of an assignment.

    Lightning has it noted some 50 times in a step, and PyTorch looks for a parameter or a module
    in each of them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


def validates_now(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether a validation follows."""
    fit_loop: Any = trainer.fit_loop
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)


def validates_too(trainer: Trainer, condition: Callable[[], bool]) -> None:
    """Validate after a training batch where `condition` holds, too."""
    loop: Any = trainer.fit_loop.epoch_loop
    as_configured = loop._should_check_val_fx
    loop._should_check_val_fx = lambda fetcher: as_configured(fetcher) or condition()


def has_validated(trainer: Trainer) -> bool:
    """Tell whether `trainer` has validated in this call of fit."""
    return trainer.fit_loop.epoch_loop.val_loop._has_run


def can_stop_early(trainer: Trainer) -> bool:
    """Tell whether `trainer` has done the least that it has to, so that it may stop."""
    return trainer.fit_loop._can_stop_early


def last_logged_row(trainer: Trainer) -> tuple[dict[str, float], int]:
    """Return what was logged last to all loggers, and the step it was logged for."""
    row = trainer._logger_connector.metrics["log"]
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
    return {name: float(value) for name, value in row.items()}, step


def logged_values(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Iterate over what the training epoch has logged so far: key and Lightning's item."""
    yield from trainer.fit_loop.epoch_loop._results.valid_items()


def reductions_of(metric: Any) -> list[Any]:
    """Return how each state of a metric, or of a logged item, is reduced over ranks."""
    return list(metric._reductions.values())


def forget_computed(*metrics: Any) -> None:
    """Let metrics, or logged items, be computed anew from their state."""
    for metric in metrics:
        metric._computed = None


class SteppedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that says when it saves, and saves when it is told to."""

    def is_due(self, step: int) -> bool:
        """Tell whether `every_n_train_steps` asks for a checkpoint of this step."""
        return self._every_n_train_steps > 0 and step % self._every_n_train_steps == 0

    def saves_in_epochs(self) -> bool:
        """Tell whether it saves after some steps or some time, not only after epochs."""
        return self._every_n_train_steps > 0 or self._train_time_interval is not None

    def save(self, trainer: Trainer) -> None:
        """Save what is best or last now, unless this step has been saved."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
