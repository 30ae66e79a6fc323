"""One trial: the runs of a setting with the tuning seeds, one after the other."""

import csv
import io
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from memfold.files import read_text
from memfold.runs.folder import METRICS
from memfold.runs.locks import try_lock
from memfold.studies.executor import Stopped
from memfold.studies.optuna_study import Study
from memfold.studies.runner import RunFailed, Runner
from memfold.studies.tuned_configuration import Configuration
from memfold.studies.tuning_report import fit_seconds

__all__ = ["Objective", "TakenOver"]

_SECONDS_BETWEEN_LOOKS = 0.5


class TakenOver(Exception):
    """Another worker gave this one up, because it was silent for too long, and tries again."""


class Objective:
    """Runs a trial and returns its value to Optuna."""

    def __init__(
        self,
        study: Study,
        configuration: Configuration,
        launcher: Runner,
        claim: ExitStack,
        hold: ExitStack,
    ) -> None:
        """Prepare one call.

        Args:
            study: Which the trial is of.
            configuration: Writes the overrides of the runs.
            launcher: Starts the runs.
            claim: Closed as soon as other workers may start trials again.
            hold: Gets the trial's lock, which has to last until Optuna knows the outcome: a
                running trial without a lock is a lost one.
        """
        self._study = study
        self._configuration = configuration
        self._launcher = launcher
        self._claim = claim
        self._hold = hold
        self.number: int | None = None
        """Of the trial, once it is known."""
        self.is_taken_over = False

    def __call__(self, trial: optuna.Trial) -> float:
        """Train with every tuning seed.

        Returns:
            The mean of the metric over the tuning seeds.

        Raises:
            optuna.TrialPruned: The first run was stopped because it was hopeless.
            RunFailed: A run failed; the study notes the reason.
            Stopped: Runs shall stop; the trial will be tried again.
            TakenOver: The trial is not this worker's any more.
        """
        setting = self._study.space.suggest(trial)
        number = self.number = self._study.number_of(trial.number)
        self._lock(self._study.lock(number))
        return self._run_seeds(trial, number, self._configuration.overrides(setting))

    def _lock(self, path: Path) -> None:
        while True:
            with ExitStack() as lock:
                is_free = lock.enter_context(try_lock(path))
                self._claim.close()
                if is_free:
                    self._hold.enter_context(lock.pop_all())
                    return
            # A worker that was suspended has it, and has yet to notice that it was given up.
            if self._launcher.stop.event.wait(_SECONDS_BETWEEN_LOOKS):
                raise Stopped

    def _run_seeds(self, trial: optuna.Trial, number: int, overrides: list[str]) -> float:
        values, seconds = [], 0.0
        metric = self._study.space.judged.name
        group = self._configuration.group(self._study.name)
        try:
            for index, seed in enumerate(self._study.space.tuning_seeds):
                folder = self._study.trial_folder(number) / f"s{seed}"
                watch = _Watch(trial, folder, metric) if index == 0 else lambda: None
                # No test data, so that nothing here can be chosen by them.
                given = [*overrides, f"seed={seed}", "trainer.limit_test_batches=0", *group]
                result = self._launcher.run(given, folder, watch)
                values.append(_metric(result, self._study.space.metric))
                seconds += fit_seconds(result)
        except RunFailed as error:
            self._check_still_ours(trial)
            trial.set_user_attr("reason", str(error))
            raise
        except UpdateFinishedTrialError as error:
            self.is_taken_over = True
            raise TakenOver from error
        self._check_still_ours(trial)
        trial.set_user_attr("values", values)
        trial.set_user_attr("seconds", seconds)
        return statistics.fmean(values)

    def _check_still_ours(self, trial: optuna.Trial) -> None:
        if not self._study.is_running(trial.number):
            self.is_taken_over = True
            raise TakenOver


class _Watch:
    """Reports each epoch of a run to Optuna, and stops the run when its pruner says so.

    Epochs are judged one by one in their order, however many end between two looks, so that the
    same runs are stopped on a slow and on a fast machine.
    """

    def __init__(self, trial: optuna.Trial, folder: Path, metric: str) -> None:
        self._trial = trial
        self._folder = folder
        self._metric = metric
        self._num_epochs = 0

    def __call__(self) -> None:
        values = _read_metric(self._folder, self._metric)
        for epoch in range(self._num_epochs, len(values)):
            self._trial.report(values[epoch], epoch)
            self._num_epochs = epoch + 1
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
    metrics = result.get("metrics") or {}
    value = metrics.get(name)
    if not isinstance(value, int | float):
        known = ", ".join(sorted(key for key in metrics if "val/" in key))
        raise RunFailed(
            f"objective.metric: result.json has no {name}; validation metrics there: {known}"
        )
    return float(value)
