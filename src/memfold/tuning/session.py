"""From the command line to a tested best setting: what one call of `scripts/tune.py` does."""

import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memfold.errors import InputError
from memfold.runs.locks import try_lock
from memfold.studies.executor import Stopped, StopSignal, work_in_parallel
from memfold.studies.runner import Runner, runners
from memfold.tuning.best import TestRun, best_trial, run_tests
from memfold.tuning.configuration import Configuration
from memfold.tuning.experiment import ExperimentFiles
from memfold.tuning.report import describe, write_report
from memfold.tuning.space import Space
from memfold.tuning.study import Study, Trial, database_errors
from memfold.tuning.workers import run_trials

__all__ = ["Session"]

_TEST_LOCK = ".test"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A call of `scripts/tune.py`, whose arguments have been checked one by one."""

    space: Space
    configuration: Configuration
    program: Path
    """`train.py`."""
    conf: Path
    """Its configuration folder."""
    folder: Path
    """Of the study, as the user wrote it."""
    num_trials: int
    num_workers: int
    experiment: str | None
    """Name of an experiment in `conf`; `None`: only the one in the study folder."""
    command: str
    """What the user typed."""

    def run(self) -> int:
        """Run what is left of the trials, then the best setting with the test seeds.

        Returns:
            The exit status.

        Raises:
            InputError: The user can put it right; the message is one line.
        """
        stop = StopSignal()
        with stop.caught(), database_errors(self.folder):
            files = ExperimentFiles(self.conf, self.folder, self.experiment)
            study = Study(self.folder.resolve(), self.space, self.configuration.common)
            workers = runners(self.program, self.num_workers, stop)
            tasks = [partial(self._work, study, one) for one in workers]
            work_in_parallel(tasks, stop.event)
            best = best_trial(study)
            with try_lock(study.folder / _TEST_LOCK) as is_free:
                if not is_free:
                    print(f"another process runs the test seeds and writes {self.folder}/report.md")
                    return 0 if stop.number is None else 128 + stop.number
                tests: list[TestRun] = []
                if best is not None and not stop.event.is_set():
                    files.write(study, self.configuration, best)
                    with suppress(Stopped):
                        tests = run_tests(study, self.configuration, workers, best)
                commands = self._commands(files, best)
                content = describe(study, self.configuration, best, tests, commands)
                write_report(study, content)
        return self._conclude(content, stop)

    def _work(self, study: Study, launcher: Runner) -> None:
        run_trials(study, self.configuration, launcher, self.num_trials)

    def _commands(self, files: ExperimentFiles, best: Trial | None) -> dict[str, str]:
        commands = {"The study, to go on with it or to join it": self.command}
        if best is not None:
            overrides = self.configuration.overrides(best.setting)
            arguments = shlex.join([*files.arguments, "seed=1"])
            commands["A run with the best setting"] = f"python train.py {arguments}"
            commands["The same without the experiment file"] = shlex.join(
                ["python", "train.py", *overrides, "seed=1"]
            )
        return commands

    def _conclude(self, content: dict[str, Any], stop: StopSignal) -> int:
        """Say how it ended, and return the exit status."""
        counts, best, test = content["num_trials"], content["best"], content["test"]
        num_done = counts["completed"] + counts["pruned"]
        summary = (
            f"{num_done} of {self.num_trials} trials done ({counts['completed']} completed, "
            f"{counts['pruned']} pruned), {counts['failed']} failed"
        )
        if stop.number is not None:
            print(f"interrupted: {summary}; the same command goes on", file=sys.stderr)
            return 128 + stop.number
        if best is None:
            reasons = [t["error"] for t in content["trials"] if t["error"]]
            raise InputError(f"--study {self.folder}: all trials failed, the last: {reasons[-1]}")
        print(f"{summary}; best: trial {best['trial']}, {self.space.metric} {best['value']:.4f}")
        print(f"report: {self.folder / 'report.md'}")
        failed = [run for run in test["runs"] if run["error"]]
        if failed:
            raise InputError(
                f"{len(failed)} of {len(test['runs'])} runs with test seeds failed, "
                f"the last: {failed[-1]['error']}; the same command tries them again"
            )
        accuracy = test["test/acc"]
        if accuracy["mean"] is not None:
            spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}"
            seeds = ", ".join(map(str, self.space.test_seeds))
            print(f"test accuracy {100 * accuracy['mean']:.2f}{spread} % (seeds {seeds})")
        return 0
