"""The study in its folder: what was tried, what is left, and what a killed process left behind."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from memfold.runs.folder import writing
from memfold.runs.locks import is_held, wait_for_lock
from memfold.studies.space import Setting, Space

__all__ = ["Notes", "Study", "Trial", "database_errors"]

_DATABASE = "study.db"
_CLAIM = ".claim"
_RUNS = ("trials", "test")
_DEFINITION = "definition"
_RETRY_OF = "retry_of"
_TESTED = "tested"
_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
}
# The trials of a killed process are found by their locks. The heartbeat is for the locks of a node
# that has gone, which its file server keeps.
_SECONDS_BETWEEN_HEARTBEATS = 10
_SECONDS_OF_SILENCE = 60
_SECONDS_FOR_THE_DATABASE = 60  # that SQLite waits for other processes


class Notes(Model):
    """What the study keeps with an attempt besides what Optuna keeps."""

    reason: str | None = None
    """Why the setting is to blame for a failure; a lost attempt has none."""
    seconds: float | None = None
    """Of a completed trial: how long its runs trained, over all attempts."""
    values: list[float] = Field([], max_length=1000)
    """Of a completed trial: the metric of each tuning seed."""
    retry_of: int | None = Field(None, ge=0)
    """Number of the trial that is tried again."""


@dataclass(frozen=True)
class Trial:
    """A setting and what came of it, over all attempts to run it."""

    number: int
    """The how manieth setting it is, from 0: the name of its folder."""
    last: FrozenTrial
    """The last attempt."""
    notes: Notes
    """On it."""

    @property
    def seconds(self) -> float:
        """In training, over all attempts, if completed; otherwise the last attempt, if it ended.

        Nobody knows when a killed attempt did.
        """
        if self.notes.seconds is not None:
            return self.notes.seconds
        return 0.0 if self.last.duration is None else self.last.duration.total_seconds()

    @property
    def state(self) -> str:
        """completed, pruned, failed, running, or waiting for the next attempt."""
        has_failed = self.last.state == TrialState.FAIL and self.notes.reason is not None
        return "failed" if has_failed else _STATES.get(self.last.state, "waiting")

    @property
    def setting(self) -> Setting:
        """A value for each parameter; empty if it was lost before they were drawn."""
        return self.last.params

    @property
    def num_epochs(self) -> int:
        """How many epochs of the first tuning seed the pruner has seen."""
        return len(self.last.intermediate_values)

    @property
    def value(self) -> float | None:
        """The objective: `None` unless the trial is completed."""
        return self.last.value if self.state == "completed" else None


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
            InputError: The folder holds something else, or runs without their study, or a study of
                another space or other overrides, or cannot be used.
        """
        self.folder = folder
        self.space = space
        file = folder / _DATABASE
        is_ours = file.exists() or (folder / _CLAIM).exists()
        if folder.exists() and not (folder.is_dir() and (is_ours or not any(folder.iterdir()))):
            raise InputError(f"--study {folder} exists and is no study; choose another folder")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self.claimed():
            has_runs = any((folder / name).exists() for name in _RUNS)
            if has_runs and not file.exists():
                raise InputError(_orphaned(folder))
            self.optuna = _open(file, space, may_create=not has_runs)
            self._refuse_other({"space": space.to_dict(), "overrides": list(common)})

    @property
    def name(self) -> str:
        """Of the folder in which the study began; it stays when that is copied or renamed."""
        return self.optuna.study_name

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep all other workers, of this process too, from counting and starting trials."""
        with wait_for_lock(self.folder / _CLAIM):
            yield

    def trials(self) -> list[Trial]:
        """Return all settings in the order in which they were drawn."""
        found: list[Trial] = []
        for attempt in self._attempts():
            place = f"{self.folder / _DATABASE} is damaged: trial {attempt.number}"
            notes = check(Notes, attempt.user_attrs, place)
            number = len(found) if notes.retry_of is None else notes.retry_of
            if notes.retry_of is not None and number >= len(found):
                raise InputError(f"{place} tries again what was never tried")
            has_value = attempt.values is not None or attempt.state != TrialState.COMPLETE
            if not (has_value and self.space.allows(attempt.params)):
                raise InputError(f"{place} is not of the study's space")
            found[number : number + 1] = [Trial(number, attempt, notes)]
        return found

    def best(self) -> Trial | None:
        """Return the completed trial with the best value, the first of equals."""
        sign = self.space.judged.sign
        completed = [trial for trial in self.trials() if trial.value is not None]
        return max(completed, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def number_of(self, attempt: int) -> int:
        """Return the number of the trial that is tried in an attempt, by Optuna's number."""
        attempts = self._attempts()
        first = attempts[attempt].user_attrs.get(_RETRY_OF)
        if first is not None:
            return first
        return sum(_RETRY_OF not in earlier.user_attrs for earlier in attempts[:attempt])

    def trial_folder(self, number: int) -> Path:
        """Return where the runs of a trial are."""
        return self.folder / "trials" / str(number)

    @property
    def test_folder(self) -> Path:
        """Where the runs of the best setting with the test seeds are."""
        return self.folder / "test"

    def claim_test_folder(self, best: Trial) -> None:
        """Set the test runs of an earlier best setting aside: more trials have found a better one.

        Raises:
            InputError: The folder cannot be moved.
        """
        before = self.optuna.user_attrs.get(_TESTED)
        if isinstance(before, int) and before != best.number and self.test_folder.exists():
            with writing(self.test_folder):
                self.test_folder.rename(self.folder / f"test-of-trial-{before}")
        self.optuna.set_user_attr(_TESTED, best.number)

    def lock(self, number: int) -> Path:
        """Return the file that the worker on a trial has locked."""
        return self.trial_folder(number) / ".lock"

    def is_running(self, attempt: int) -> bool:
        """Tell whether an attempt, by Optuna's number, has not been given up by somebody."""
        return self._attempts()[attempt].state == TrialState.RUNNING

    def recover(self) -> None:
        """Let the trials of processes that have gone be tried again. To be called when `claimed`.

        Those that ended without a word on their setting: killed, interrupted, or out of disk.
        """
        for trial in self.trials():
            if trial.state == "running" and not is_held(self.lock(trial.number)):
                # It may have ended since we looked: its worker tells before it lets go of the lock.
                self.optuna.tell(trial.last.number, state=TrialState.FAIL, skip_if_finished=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.optuna)
        for trial in self.trials():
            if trial.state == "waiting" and trial.last.state != TrialState.WAITING:
                is_drawn = trial.setting.keys() == self.space.parameters.keys()
                setting = trial.setting if is_drawn else {}
                self.optuna.enqueue_trial(setting, user_attrs={_RETRY_OF: trial.number})

    def seed_sampler(self) -> None:
        """Seed the sampler for the trial that comes next. To be called when `claimed`."""
        trials = self.trials()
        waiting = [trial for trial in trials if trial.last.state == TrialState.WAITING]
        first = min(waiting, key=lambda trial: trial.last.number, default=None)
        number = len(trials) if first is None else first.number
        self.optuna.sampler = _sampler(self.space, number)

    def _attempts(self) -> list[FrozenTrial]:
        try:
            return self.optuna.get_trials(deepcopy=False)
        except (ValueError, LookupError, TypeError) as error:  # of what another has written there
            raise InputError(f"{self.folder / _DATABASE} is damaged: {error}") from error

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


def _orphaned(folder: Path) -> str:
    return (
        f"--study {folder} holds runs, but its {_DATABASE} has no study of them; put "
        f"{_DATABASE} back, or choose another folder"
    )


def _open(file: Path, space: Space, *, may_create: bool) -> optuna.Study:
    """Open the only study in `file`, by whatever name, so that a moved folder goes on as itself."""
    url = sqlalchemy.URL.create("sqlite", database=str(file)).render_as_string()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna fills in a template
            engine_kwargs={"connect_args": {"timeout": _SECONDS_FOR_THE_DATABASE}},
            heartbeat_interval=_SECONDS_BETWEEN_HEARTBEATS,
            grace_period=_SECONDS_OF_SILENCE,
        )
    pruning, sampler = space.pruner, _sampler(space, 0)
    pruner = (
        optuna.pruners.NopPruner()
        if pruning is None
        else optuna.pruners.MedianPruner(pruning.startup_trials, pruning.warmup_epochs)
    )
    names = optuna.get_all_study_names(storage)
    if len(names) > 1:
        raise InputError(f"{file} holds {len(names)} studies, not one; choose another folder")
    if names:
        return optuna.load_study(
            study_name=names[0], storage=storage, sampler=sampler, pruner=pruner
        )
    if not may_create:
        raise InputError(_orphaned(file.parent))
    return optuna.create_study(
        storage=storage,
        study_name=file.parent.name,
        direction="maximize" if space.judged.mode == "max" else "minimize",
        sampler=sampler,
        pruner=pruner,
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


def _first_difference(before: Any, now: Any, name: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                path = f"{name}.{key}" if name else key
                return _first_difference(before.get(key), now.get(key), path)
        return "the parameters in another order"
    words = [" ".join(map(str, v)) if isinstance(v, list) else v for v in (before, now)]
    return f"{name} {words[0]!r:.200}, not {words[1]!r:.200}"
