"""Planned runs, each completed once: found, resumed, replaced, or run from the start."""

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from memfold.errors import InputError
from memfold.files import read_json
from memfold.overrides import quote_value
from memfold.runs.folder import (
    LOCK,
    OUTPUT,
    OVERRIDES,
    can_be_resumed,
    is_completed,
    read_result,
    write_text_atomically,
    writing,
)
from memfold.runs.locks import is_held
from memfold.runs.recorded import read_overrides
from memfold.studies.executor import Stopped, StopSignal, share_out, work_in_parallel
from memfold.studies.process import reason, run_program

__all__ = ["Outcome", "RunFailed", "Runner", "run_all", "runners", "wait_for_orphan"]

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_FOR_ORPHANS = 60.0


class RunFailed(Exception):
    """The run ended without a result; the message is the reason, in one line."""


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended."""

    result: Mapping[str, Any]
    """Contents of `result.json`; empty when it failed."""
    error: str
    """Why it failed, in one line; empty when it is completed."""
    seconds: float


@dataclass(frozen=True)
class Runner:
    """Runs one after the other, in one of the slots of this machine."""

    program: Path
    """`train.py`."""
    stop: StopSignal = field(default_factory=StopSignal)
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the runs get besides those of this process."""

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
        if not (is_same and is_completed(folder)):
            wait_for_orphan(folder, self.stop.event)
        if is_same and is_completed(folder):
            watch()
            return read_result(folder)
        if is_same and can_be_resumed(folder):
            try:
                return self._train(
                    [*overrides, f"resume={quote_value(str(folder))}"], folder, watch
                )
            except RunFailed as error:
                if not str(error).startswith("resume"):
                    raise
        with writing(folder):
            if folder.exists():
                shutil.rmtree(folder)
        write_text_atomically(_beside(folder, OVERRIDES), json.dumps(list(overrides)) + "\n")
        return self._train([*overrides, f"hydra.run.dir={quote_value(str(folder))}"], folder, watch)

    def _train(
        self, arguments: Sequence[str], folder: Path, watch: Callable[[], None]
    ) -> dict[str, Any]:
        if self.stop.event.is_set():
            raise Stopped
        status, printed = run_program(
            [str(self.program), *arguments],
            _beside(folder, OUTPUT),
            self.variables,
            self.stop.wanted,
            watch,
        )
        if self.stop.event.is_set():
            raise Stopped
        if status != 0 or not is_completed(folder):
            raise RunFailed(reason(status, printed, read_result(folder)))
        watch()
        return read_result(folder)


def runners(program: Path, num_slots: int, stop: StopSignal) -> list[Runner]:
    """Return a runner for each slot of this machine, which shares out its cores and GPUs."""
    return [Runner(program, stop, variables) for variables in share_out(num_slots, os.environ)]


def run_all(
    runs: Iterable[tuple[str, Sequence[str]]],
    folder: Path,
    workers: Sequence[Runner],
    report: Callable[[str, Outcome], None],
) -> dict[str, Outcome]:
    """Run what is missing, in the order given; a run that fails leaves the others alone.

    Args:
        runs: Names of run folders, and overrides.
        folder: In which those are.
        workers: One for each run at a time.
        report: Told of each run as it ends, of one at a time.

    Returns:
        How each ended, by name.

    Raises:
        Stopped: The user, or the machine, wants all runs to stop.
        InputError: The folder cannot be written.
    """
    outcomes: dict[str, Outcome] = {}
    one_by_one = threading.Lock()
    waiting: queue.SimpleQueue[tuple[str, Sequence[str]]] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)

    def work(worker: Runner) -> None:
        while not worker.stop.event.is_set():
            try:
                name, overrides = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            result, error = {}, ""
            try:
                result = worker.run(overrides, folder / name)
            except RunFailed as failure:
                error = str(failure)
            except Stopped:
                return
            with one_by_one:
                outcomes[name] = Outcome(result, error, time.monotonic() - start)
                report(name, outcomes[name])

    stop = workers[0].stop.event
    work_in_parallel([partial(work, worker) for worker in workers], stop)
    if stop.is_set():
        raise Stopped
    return outcomes


def wait_for_orphan(folder: Path, stop: threading.Event) -> None:
    """Wait for the run of a killed worker, which ends when it notices.

    Raises:
        Stopped: `stop` was set.
        InputError: It does not end.
    """
    deadline = time.monotonic() + _SECONDS_FOR_ORPHANS
    while is_held(folder / LOCK):
        if stop.wait(_SECONDS_BETWEEN_LOOKS):
            raise Stopped
        if time.monotonic() > deadline:
            raise InputError(f"{folder} is in use by another process; end it, and start again")


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _read_overrides(folder: Path) -> object:
    """Return what the run in `folder` was started with; `None` where nothing says so."""
    try:
        return read_json(_beside(folder, OVERRIDES))
    except FileNotFoundError:  # a run of somebody else
        with suppress(InputError):
            return [o.input_line for o in read_overrides(folder) if o.key_or_group != "resume"]
    except (OSError, ValueError):
        pass
    return None
