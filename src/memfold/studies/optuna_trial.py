"""One trial: the runs of a setting with the tuning seeds, one after the other."""

import csv
import io
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from memfold.files import read_text
from memfold.runs.folder import METRICS
from memfold.studies.optuna_study import Study
from memfold.studies.runner import RunFailed, Runner, fit_seconds, metric_of
from memfold.studies.tuned_configuration import Configuration

__all__ = ["run_trial"]


def run_trial(
    study: Study, configuration: Configuration, trial: optuna.Trial, worker: Runner
) -> None:
    """Train with every tuning seed, and tell Optuna the mean of the metric, or why there is none.

    Args:
        study: Which the trial is of. The caller holds the trial's lock.
        configuration: Writes the overrides of the runs.
        trial: Of `next_trial`.
        worker: Starts the runs.

    Raises:
        Stopped: Runs shall stop. Optuna is told nothing: the trial will be gone on with.
    """
    start = time.monotonic()
    notes: dict[str, Any] = {}
    value = None
    try:
        notes["values"], notes["seconds"] = _run_seeds(study, configuration, trial, worker)
        value, state = statistics.fmean(notes["values"]), TrialState.COMPLETE
    except RunFailed as error:
        state = TrialState.FAIL
        notes["reason"] = str(error)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    with study.claimed():
        for name, note in ({"seconds": time.monotonic() - start} | notes).items():
            trial.set_user_attr(name, note)
        study.optuna.tell(trial, value, state)


def _run_seeds(
    study: Study, configuration: Configuration, trial: optuna.Trial, worker: Runner
) -> tuple[list[float], float]:
    """Return the metric of every tuning seed, and how long the runs trained."""
    overrides = configuration.overrides(trial.params)
    group = configuration.group(study.name)
    values, seconds = [], 0.0
    for index, seed in enumerate(study.space.tuning_seeds):
        folder = study.trial_folder(trial.number) / f"s{seed}"
        watch = _Watch(study, trial, folder) if index == 0 else lambda: None
        # No test data, so that nothing here can be chosen by them.
        given = [*overrides, f"seed={seed}", "trainer.limit_test_batches=0", *group]
        result = worker.run(given, folder, watch)
        values.append(_metric(result, study.space.objective.metric))
        seconds += fit_seconds(result)
    return values, seconds


class _Watch:
    """Reports each epoch of a run to Optuna, and stops the run when its pruner says so.

    Epochs are judged one by one in their order, however many end between two looks, so that the
    same runs are stopped on a slow and on a fast machine.
    """

    def __init__(self, study: Study, trial: optuna.Trial, folder: Path) -> None:
        self._trial = trial
        self._folder = folder
        self._metric = study.space.objective.judged.name
        self._num_reported = study.trials()[trial.number].num_epochs
        # The last one may not have been judged yet.
        self._num_judged = max(0, self._num_reported - 1)

    def __call__(self) -> None:
        values = _read_metric(self._folder, self._metric)
        for epoch in range(self._num_judged, len(values)):
            if epoch >= self._num_reported:
                self._trial.report(values[epoch], epoch)
            self._num_judged = epoch + 1
            if self._trial.should_prune():
                raise optuna.TrialPruned


def _read_metric(folder: Path, name: str) -> list[float]:
    """Return a metric of each epoch, as far as the run in `folder` has written it.

    NaN stays NaN. Rounds follow one another.
    """
    try:
        text = read_text(folder / METRICS)
    except FileNotFoundError:
        return []
    whole_lines = text[: text.rfind("\n") + 1]  # the last one may be half written
    rows = csv.DictReader(io.StringIO(whole_lines))
    return [float(row[name]) for row in rows if row.get(name)]


def _metric(result: Mapping[str, Any], name: str) -> float:
    value = metric_of(result, name)
    if value is None:
        known = ", ".join(sorted(key for key in result.get("metrics") or () if "val/" in key))
        raise RunFailed(
            f"objective.metric: result.json has no {name}; validation metrics there: {known}"
        )
    return value
