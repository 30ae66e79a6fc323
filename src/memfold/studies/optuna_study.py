"""The study in its folder: what was tried, and what is left to try."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from memfold.errors import InputError
from memfold.file_models import Model, check
from memfold.runs.locks import is_held, wait_for_lock
from memfold.runs.recorded import leaves_of
from memfold.studies.space import Setting, Space

__all__ = ["Notes", "Study", "Trial", "database_errors"]

_DATABASE = "study.db"
_CLAIM = ".claim"
_DEFINITION = "definition"
_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "enqueued",  # by somebody else
}
_SECONDS_FOR_THE_DATABASE = 60  # that SQLite waits for other processes


class Notes(Model):
    """What the study keeps with a trial besides what Optuna keeps."""

    reason: str = "it was given up"
    """Why a failed one has failed."""
    seconds: float = 0.0
    """Of a completed one: how long its runs trained; otherwise how long the last attempt took."""
    values: list[float] = Field([], max_length=1000)
    """Of a completed one: the metric of each tuning seed."""


@dataclass(frozen=True)
class Trial:
    """A setting and what came of it."""

    number: int
    """From 0: the name of its folder."""
    state: str
    """completed, pruned, failed, running, or waiting for a worker to go on with it."""
    setting: Setting
    """A value for each parameter."""
    value: float | None
    """The objective: `None` unless the trial is completed."""
    num_epochs: int
    """How many epochs of the first tuning seed the pruner has seen."""
    notes: Notes


@contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn what the database of a study raises into one line.

    Raises:
        InputError: The block raised an error of Optuna or SQLAlchemy.
    """
    try:
        yield
    except (SQLAlchemyError, OptunaError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{folder / _DATABASE} cannot be used: {reason}") from error


class Study:
    """An Optuna study in `folder/study.db`, shared by all processes that work on it.

    To Optuna, a trial runs until its outcome is known. Its worker holds the trial's lock until
    then, so one that runs without is left to whoever comes next: its worker was killed, or stopped.

    Everything random of a trial comes from the sampler's seed and the trial's number, so that an
    interrupted study goes on as if nothing had happened.
    """

    def __init__(self, folder: Path, space: Space, common: Sequence[str]) -> None:
        """Open the study, or make a new one.

        Args:
            folder: The study folder.
            space: What is tuned.
            common: Overrides of `train.py` that all trials share.

        Raises:
            InputError: The folder holds something else, or a study of another space or other
                overrides, or cannot be used.
        """
        self.folder = folder
        self.space = space
        self._file = folder / _DATABASE
        is_ours = self._file.exists() or (folder / _CLAIM).exists()
        if folder.exists() and not (folder.is_dir() and (is_ours or not any(folder.iterdir()))):
            raise InputError(f"--study {folder} exists and is no study; choose another folder")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self.claimed():
            self._storage, self.optuna = self._open()
            self._refuse_other({"space": space.to_dict(), "overrides": list(common)})

    @property
    def name(self) -> str:
        """Of the folder in which the study began; it stays when that is copied or renamed."""
        return self.optuna.study_name

    def claimed(self) -> AbstractContextManager[None]:
        """Keep all other workers, of this process too, from starting and ending trials."""
        return wait_for_lock(self.folder / _CLAIM)

    def trials(self) -> list[Trial]:
        """Return all trials in the order in which they were drawn."""
        try:
            found = self.optuna.get_trials(deepcopy=False)
        except (ValueError, LookupError, TypeError) as error:  # of what another has written there
            raise InputError(f"{self._file} is damaged: {error}") from error
        return [self._read(trial) for trial in found]

    def best(self) -> Trial | None:
        """Return the completed trial with the best value, the first of equals."""
        sign = self.space.objective.judged.sign
        completed = [trial for trial in self.trials() if trial.value is not None]
        return max(completed, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def next_trial(self) -> optuna.Trial:
        """Return the first trial that waits, or draw a new one. To be called when `claimed`."""
        trials = self.trials()
        waiting = [trial.number for trial in trials if trial.state == "waiting"]
        number = waiting[0] if waiting else len(trials)
        self.optuna.sampler = _sampler(self.space, number)
        if waiting:
            study = self._storage.get_study_id_from_name(self.name)
            found = self._storage.get_trial_id_from_study_id_trial_number(study, number)
            trial = optuna.Trial(self.optuna, found)
        else:
            trial = self.optuna.ask()
        for key, parameter in self.space.parameters.items():
            parameter.suggest(trial, key)  # what was drawn before stays
        return trial

    def trial_folder(self, number: int) -> Path:
        """Return where the runs of a trial are."""
        return self.folder / "trials" / str(number)

    def lock(self, number: int) -> Path:
        """Return the file that the worker on a trial has locked."""
        return self.trial_folder(number) / ".lock"

    @property
    def test_folder(self) -> Path:
        """Where the runs of the best setting with the test seeds are."""
        return self.folder / "test"

    def _open(self) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
        """Open the only study in the file, by whatever name: a moved folder goes on as itself."""
        url = sqlalchemy.URL.create("sqlite", database=str(self._file)).render_as_string()
        storage = optuna.storages.RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna fills in a template
            engine_kwargs={"connect_args": {"timeout": _SECONDS_FOR_THE_DATABASE}},
        )
        names = optuna.get_all_study_names(storage)
        if len(names) > 1:
            raise InputError(
                f"{self._file} holds {len(names)} studies, not one; choose another folder"
            )
        pruning = self.space.pruner
        return storage, optuna.create_study(
            storage=storage,
            study_name=names[0] if names else self.folder.name,
            direction="maximize" if self.space.objective.judged.mode == "max" else "minimize",
            pruner=optuna.pruners.NopPruner()
            if pruning is None
            else optuna.pruners.MedianPruner(pruning.startup_trials, pruning.warmup_epochs),
            load_if_exists=True,
        )

    def _read(self, trial: FrozenTrial) -> Trial:
        place = f"{self._file} is damaged: trial {trial.number}"
        notes = check(Notes, trial.user_attrs, place)
        state = _STATES[trial.state]
        has_value = trial.values is not None or state != "completed"
        if not (has_value and self.space.allows(trial.params)):
            raise InputError(f"{place} is not of the study's space")
        if state == "running" and not is_held(self.lock(trial.number)):
            state = "waiting"
        value = trial.value if state == "completed" else None
        num_epochs = len(trial.intermediate_values)
        return Trial(trial.number, state, trial.params, value, num_epochs, notes)

    def _refuse_other(self, definition: dict[str, Any]) -> None:
        now = json.loads(json.dumps(definition))
        before = self.optuna.user_attrs.get(_DEFINITION)
        if before is None:
            self.optuna.set_user_attr(_DEFINITION, now)
        elif before != now:
            raise InputError(
                f"--study {self.folder} was started with {_first_difference(before, now)}; "
                "a study keeps its space and its overrides, so choose another folder"
            )


def _sampler(space: Space, number: int) -> optuna.samplers.BaseSampler:
    digest = hashlib.sha256(f"{space.sampler.seed}:{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], "big"),
            n_startup_trials=space.sampler.startup_trials,
            constant_liar=True,  # keeps several workers from trying the same
        )


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = dict(leaves_of(before)), dict(leaves_of(now))
    keys = dict.fromkeys([*old, *new])
    pairs = ((key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys)
    key, *values = next(pair for pair in pairs if pair[1] != pair[2])
    words = [" ".join(map(str, v)) if isinstance(v, list) else v for v in values]
    return f"{key} {words[0]!r:.200}, not {words[1]!r:.200}"
