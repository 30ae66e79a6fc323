"""One run of `train.py`: started or resumed, watched, stopped, and its result."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfold.errors import InputError
from memfold.files import read_json, read_text
from memfold.overrides import quote_value
from memfold.runs.folder import (
    LAST_CHECKPOINT,
    LOCK,
    METRICS,
    OUTPUT,
    OVERRIDES,
    ROUNDS,
    read_result,
    write_text_atomically,
    writing,
)
from memfold.runs.locks import is_held
from memfold.training.sweeps.isolation import job_environment

__all__ = [
    "Launcher",
    "RunFailed",
    "Stopped",
    "read_metric",
    "wait_for_orphan",
]

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_TO_STOP = 20.0
_SECONDS_FOR_ORPHANS = 60.0


class RunFailed(Exception):
    """The run ended without a result; the message is the reason, in one line."""


class Stopped(Exception):
    """The user, or the machine, wants all runs to stop."""


@dataclass(frozen=True)
class Launcher:
    """What all runs of a worker have in common."""

    program: Path
    """`train.py`."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the runs get besides those of this process."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when runs shall stop."""

    def run(
        self, overrides: Sequence[str], folder: Path, watch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return the result of the completed run in `folder`, after as much training as it needs.

        A run that has a checkpoint is resumed, and replaced if that cannot be done. A run that was
        started with other overrides is replaced, too: its result answers another question.

        Args:
            overrides: Of `train.py`, without the folder.
            folder: The run folder. What the run prints goes into `folder` + `.txt`, the
                overrides into `folder` + `.overrides.json`.
            watch: Called again and again; what it raises stops the run.

        Raises:
            RunFailed: The run failed.
            Stopped: `stop` was set.
            InputError: The folder cannot be written.
        """
        is_same = _read_overrides(folder) == list(overrides)
        if not (is_same and _is_completed(read_result(folder))):
            wait_for_orphan(folder, self.stop)
        result = read_result(folder)
        if is_same and _is_completed(result):
            watch()
            return result
        has_checkpoint = (folder / LAST_CHECKPOINT).exists() or (folder / ROUNDS / "0").exists()
        if is_same and has_checkpoint:
            try:
                place = f"resume={quote_value(str(folder))}"
                return self._train([*overrides, place], folder, watch)
            except RunFailed as error:
                if not str(error).startswith("resume"):
                    raise
        with writing(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(_overrides_file(folder), json.dumps(list(overrides)) + "\n")
        place = f"hydra.run.dir={quote_value(str(folder))}"
        return self._train([*overrides, place], folder, watch)

    def _train(
        self, arguments: Sequence[str], folder: Path, watch: Callable[[], None]
    ) -> dict[str, Any]:
        if self.stop.is_set():
            raise Stopped
        output = folder.with_name(folder.name + OUTPUT)
        with writing(output):
            file = output.open("ab")
        with file:
            start = file.tell()
            process = self._start(arguments, file)
            try:
                while _wait(process, _SECONDS_BETWEEN_LOOKS) is None:
                    if self.stop.is_set():
                        raise Stopped
                    watch()
            finally:
                _stop(process)
        if self.stop.is_set():  # Ctrl-C reaches some launchers' children at once
            raise Stopped
        result = read_result(folder)
        if process.returncode != 0 or not _is_completed(result):
            printed = output.read_bytes()[start:].decode(errors="replace")
            raise RunFailed(_reason(process.returncode, printed, result))
        watch()
        return result

    def _start(self, arguments: Sequence[str], output: io.BufferedWriter) -> subprocess.Popen:
        environment = {**job_environment(os.environ), **self.variables}
        # A session of its own, so that the terminal's Ctrl-C reaches the run once, through us, and
        # `_stop` gets the run's children, too.
        return subprocess.Popen(
            [sys.executable, str(self.program), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_orphan(folder: Path, stop: threading.Event) -> None:
    """Wait for the run of a killed worker, which ends when it notices.

    Raises:
        Stopped: `stop` was set.
        InputError: It does not end.
    """
    seconds = 0.0
    while is_held(folder / LOCK):
        if stop.wait(_SECONDS_BETWEEN_LOOKS):
            raise Stopped
        seconds += _SECONDS_BETWEEN_LOOKS
        if seconds > _SECONDS_FOR_ORPHANS:
            raise InputError(f"{folder} is in use by another process; end it, and start again")


def read_metric(folder: Path, name: str) -> list[float]:
    """Return a metric of each epoch, as far as the run in `folder` has written it.

    NaN stays NaN. Rounds follow one another.

    Raises:
        ValueError: A cell is no number.
    """
    try:
        text = read_text(folder / METRICS)
    except FileNotFoundError:
        return []
    whole_lines = text[: text.rfind("\n") + 1]  # the last one may be half written
    rows = csv.DictReader(io.StringIO(whole_lines))
    return [float(row[name]) for row in rows if row.get(name)]


def _is_completed(result: Mapping[str, Any]) -> bool:
    return result.get("status") == "completed"


def _overrides_file(folder: Path) -> Path:
    return folder.with_name(folder.name + OVERRIDES)


def _read_overrides(folder: Path) -> object:
    try:
        return read_json(_overrides_file(folder))
    except (OSError, ValueError):
        return None


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _stop(process: subprocess.Popen) -> None:
    """End the run and its children, with time to save a checkpoint."""
    if process.poll() is not None:
        return
    _signal_group(process, signal.SIGTERM)
    _wait(process, _SECONDS_TO_STOP)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _reason(status: int, printed: str, result: Mapping[str, Any]) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return str(result.get("error") or f"ended with status {status} and without a result")
