"""Running a plan: every method chooses on validation, then runs with its choice and all seeds."""

import csv
import io
import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from memfold.comparison.folders import CHOICES, OTHERS, RUNS
from memfold.comparison.plan import Plan, PlannedRun, number_text
from memfold.comparison.put_aside import sort_runs
from memfold.launching.run import Launcher, RunFailed, Stopped
from memfold.launching.workers import work_in_parallel
from memfold.runs.folder import write_text_atomically

__all__ = ["Choice", "Progress", "run_plan"]

_METRIC = "val/acc"


@dataclass(frozen=True)
class Choice:
    """A value that a method tried on validation."""

    run: PlannedRun
    val_accuracy: float | None
    """`None`: the run failed."""
    error: str = ""
    is_best: bool = False


@dataclass
class Progress:
    """What has been run so far; prints a line for each run."""

    num_runs: int
    """Of the plan."""
    num_done: int = 0
    failed: list[str] = field(default_factory=list)
    """One line for each run that failed."""
    others: list[str] = field(default_factory=list)
    """Names of runs that this plan does not make: another one did, or other choices."""
    _lock: Lock = field(default_factory=Lock)

    def note(self, name: str, accuracy: float | None, error: str, seconds: float) -> None:
        """Print how a run ended."""
        with self._lock:
            self.num_done += 1
            if accuracy is None:
                self.failed.append(f"{name}: {error}")
            outcome = f"failed: {error}" if accuracy is None else f"{_METRIC} {accuracy:.4f}"
            print(
                f"[{self.num_done}/{self.num_runs}] {name}: {outcome} ({seconds:.0f} s)", flush=True
            )


def run_plan(plan: Plan, folder: Path, launchers: Sequence[Launcher]) -> Progress:
    """Run what is missing of a plan.

    Completed runs are kept, interrupted ones resumed. A run that fails is recorded, and the others
    go on.

    Args:
        plan: What to run.
        folder: Holds `choices/`, `choices.csv` and `runs/`. Runs that this plan does not make are
            moved to `other_runs/`, and come back when a plan makes them.
        launchers: One for each run at a time.

    Raises:
        Stopped: The user, or the machine, wants all runs to stop.
        InputError: The folder cannot be written.
    """
    groups = [(method, place) for method in plan.methods for place in plan.places(method)]
    tried = [run for group in groups for run in plan.tried_runs(*group)]
    compared = [run for group in groups for run in plan.compared_runs(*group, plan.values[0])]
    progress = Progress(len(tried) + len(compared))
    outcomes = _run_all(tried, folder / CHOICES, launchers, progress)
    choices = [choice for group in groups for choice in _choose(plan.tried_runs(*group), outcomes)]
    write_text_atomically(folder / f"{CHOICES}.csv", _table(choices))
    best = [choice.run for choice in choices if choice.is_best]
    runs = [
        run
        for group, chosen in zip(groups, best, strict=True)
        for run in plan.compared_runs(*group, chosen.value)
    ]
    names = [run.name for run in runs]
    progress.others = sort_runs(folder / RUNS, folder / OTHERS, names, launchers[0].stop)
    _run_all(runs, folder / RUNS, launchers, progress)
    return progress


def _choose(
    runs: Sequence[PlannedRun], outcomes: dict[str, tuple[float | None, str]]
) -> list[Choice]:
    """Mark the best value; the first one where all failed, so that the failure is on record."""
    accuracies = [outcomes[run.name][0] for run in runs]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    best = accuracies.index(max(known)) if known else 0
    return [
        Choice(run, *outcomes[run.name], is_best=number == best) for number, run in enumerate(runs)
    ]


def _run_all(
    runs: Iterable[PlannedRun], folder: Path, launchers: Sequence[Launcher], progress: Progress
) -> dict[str, tuple[float | None, str]]:
    """Return, for each run's name, its accuracy on validation, or why it has none."""
    outcomes: dict[str, tuple[float | None, str]] = {}
    waiting: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)

    def work(launcher: Launcher) -> None:
        while not launcher.stop.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            accuracy, error = None, ""
            try:
                accuracy = _accuracy(launcher.run(run.overrides, folder / run.name))
            except RunFailed as failure:
                error = str(failure)
            except Stopped:
                return
            outcomes[run.name] = (accuracy, error)
            progress.note(run.name, accuracy, error, time.monotonic() - start)

    stop = launchers[0].stop
    work_in_parallel([partial(work, launcher) for launcher in launchers], stop)
    if stop.is_set():
        raise Stopped
    return outcomes


def _accuracy(result: Mapping[str, Any]) -> float:
    metrics = result.get("metrics")
    accuracy = metrics.get(_METRIC) if isinstance(metrics, Mapping) else None
    if not isinstance(accuracy, int | float):
        raise RunFailed(f"its result has no {_METRIC}")
    return accuracy


def _table(choices: Sequence[Choice]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "ratio", "value", _METRIC, "chosen", "error"])
    for choice in choices:
        ratio = "" if choice.run.ratio is None else number_text(choice.run.ratio)
        accuracy = "" if choice.val_accuracy is None else f"{choice.val_accuracy:.4f}"
        chosen = "yes" if choice.is_best else ""
        writer.writerow(
            [
                choice.run.method,
                ratio,
                number_text(choice.run.value),
                accuracy,
                chosen,
                choice.error,
            ]
        )
    return text.getvalue()
