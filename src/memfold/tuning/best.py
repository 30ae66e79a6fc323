"""The best setting: chosen on validation data, run with the test seeds."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memfold.runs.folder import writing
from memfold.studies.executor import work_in_parallel
from memfold.studies.runner import RunFailed, Runner
from memfold.tuning.configuration import Configuration
from memfold.tuning.study import Study, Trial

__all__ = ["TestRun", "best_trial", "run_tests"]

_TESTED = "tested"


@dataclass(frozen=True)
class TestRun:
    """The best setting with one test seed."""

    __test__ = False  # for pytest

    seed: int
    folder: Path
    command: str
    accuracy: float | None
    seconds: float | None
    reason: str | None
    """Why the run failed, if it did."""


def best_trial(study: Study) -> Trial | None:
    """Return the completed trial with the best value, the first of equals."""
    sign = -1 if study.space.maximize else 1
    completed = [trial for trial in study.trials() if trial.value is not None]
    return min(completed, key=lambda trial: sign * (trial.value or 0.0), default=None)


def run_tests(
    study: Study, configuration: Configuration, launchers: Sequence[Runner], best: Trial
) -> list[TestRun]:
    """Run the best setting with every test seed that has not been run with it.

    Raises:
        Stopped: The runs were told to stop.
    """
    _make_room(study, best)
    overrides = configuration.overrides(best.setting)
    seeds = study.space.test_seeds
    waiting = iter(seeds)
    found: dict[int, TestRun] = {}

    def work(launcher: Runner) -> None:
        for seed in waiting:
            found[seed] = _run_test(study, configuration, launcher, overrides, seed)

    work_in_parallel([lambda one=one: work(one) for one in launchers], launchers[0].stop.event)
    return [found[seed] for seed in seeds]


def _run_test(
    study: Study,
    configuration: Configuration,
    launcher: Runner,
    overrides: Sequence[str],
    seed: int,
) -> TestRun:
    folder = study.folder / "test" / f"s{seed}"
    given = [*overrides, f"seed={seed}"]
    command = shlex.join(["python", "train.py", *given])
    try:
        result = launcher.run([*given, *configuration.group(study.name, job_type=None)], folder)
    except RunFailed as error:
        print(f"test seed {seed}: failed: {error}", flush=True)
        return TestRun(seed, folder, command, None, None, str(error))
    metrics, times = result.get("metrics") or {}, result.get("time") or {}
    accuracy = metrics.get("test/acc")
    shown = "-" if accuracy is None else f"{accuracy:.4f}"
    print(f"test seed {seed}: test/acc {shown}", flush=True)
    return TestRun(seed, folder, command, accuracy, times.get("fit_seconds"), None)


def _make_room(study: Study, best: Trial) -> None:
    """Set the test runs of an earlier best setting aside: more trials have found a better one."""
    before = study.optuna.user_attrs.get(_TESTED)
    folder = study.folder / "test"
    if before not in (None, best.number) and folder.exists():
        with writing(folder):
            folder.rename(study.folder / f"test-of-trial-{before}")
    study.optuna.set_user_attr(_TESTED, best.number)
