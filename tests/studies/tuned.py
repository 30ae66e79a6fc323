"""Start studies whose runs are those of the stand-in: in this process, or in one of their own."""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from memfold.file_models import read_yaml
from memfold.studies.optuna_search import main
from memfold.studies.optuna_study import Study, Trial
from memfold.studies.space import Space

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
STAND_IN = Path(__file__).with_name("stand_in.py")

SPACE: dict[str, Any] = {
    "sampler": {"seed": 0, "startup_trials": 4},
    "pruner": None,
    "tuning_seeds": [1, 2],
    "test_seeds": [11, 12],
    "parameters": {
        "optimizer.lr": {"float": {"low": 1e-3, "high": 1.0, "log": True}},
        "scheduler": {"choice": ["cosine", "multistep"]},
    },
}
OVERRIDES = ("trainer.max_epochs=3", "logger=csv")


def write_space(folder: Path, **changes: object) -> Path:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(SPACE | changes, sort_keys=False))
    return file


def arguments(folder: Path, num_trials: int, *options: str, **changes: object) -> list[str]:
    """Return the command line of a study in `folder/study`."""
    space = str(write_space(folder, **changes))
    study = ["--study", str(folder / "study"), "--trials", str(num_trials)]
    return [space, *study, *options, "--", *OVERRIDES]


def tune(folder: Path, num_trials: int, *options: str, **changes: object) -> int:
    """Tune in this process; return the exit status."""
    return main(arguments(folder, num_trials, *options, **changes), STAND_IN, CONF)


class Worker:
    """A call of tune.py in a process of its own, as on another terminal.

    Python's fork server imports torch and Optuna once for all of them.
    """

    def __init__(self, folder: Path, num_trials: int, *options: str, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["memfold.studies.optuna_search", "studies.tuned"])
        self._output = Path(tempfile.mkdtemp(dir=folder))
        given = arguments(folder, num_trials, *options)
        self.process = context.Process(target=_work, args=(given, self._output, environment))
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int | None, str, str]:
        """Return the exit status (negative: the signal), stdout and stderr."""
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.output("stdout"))
        return self.process.exitcode, self.output("stdout"), self.output("stderr")

    def output(self, name: str) -> str:
        return (self._output / name).read_text()


def _work(given: list[str], output: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    for name in ("stdout", "stderr"):
        setattr(sys, name, (output / name).open("w", buffering=1))
    sys.exit(main(given, STAND_IN, CONF))


def open_study(folder: Path) -> Study:
    return Study(folder / "study", read_yaml(folder / "space.yaml", Space), OVERRIDES)


def trials(folder: Path) -> list[Trial]:
    return open_study(folder).trials()


def settings(folder: Path) -> list[dict]:
    return [trial.setting for trial in trials(folder)]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "study" / "report.json").read_text())


def num_starts(folder: Path) -> int:
    return sum(len(file.read_text().split()) for file in folder.rglob("starts"))
