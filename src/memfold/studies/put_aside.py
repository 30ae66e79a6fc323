"""Runs that answer another question leave the place where they would be taken for an answer."""

import itertools
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from memfold.errors import InputError
from memfold.files import writing
from memfold.runs.folder import LOCK, OUTPUT, OVERRIDES
from memfold.runs.locks import is_held
from memfold.studies.process import Stopped

__all__ = ["put_aside", "sort_runs", "wait_for_orphan"]

_REPLACED = ".replaced"  # reports leave out what begins with a dot
_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_FOR_ORPHANS = 60.0


def put_aside(folder: Path) -> None:
    """Move a run that another is to replace to `.replaced/NUMBER/` beside it.

    Args:
        folder: The run folder; the files beside it move too.

    Raises:
        InputError: A folder cannot be written.
    """
    places = (folder.parent / _REPLACED / str(number) for number in itertools.count(1))
    _move(folder.name, folder.parent, next(p for p in places if not (p / folder.name).exists()))


def sort_runs(runs: Path, aside: Path, wanted: Iterable[str], stop: threading.Event) -> list[str]:
    """Move the runs that are not wanted from `runs` to `aside`, and those that are back.

    A kill in between leaves each file in one of the two; the same call goes on.

    Args:
        runs: Holds run folders that a study has started, and the files beside them.
        aside: The other folder; runs of the same name there are replaced.
        wanted: Names of the runs that belong in `runs`.
        stop: Set when the user wants to stop.

    Returns:
        The names of all runs in `aside` then.

    Raises:
        Stopped: `stop` was set.
        InputError: A folder cannot be written, or a run that is to be moved does not end.
    """
    wanted = set(wanted)
    for name in sorted(_names(runs) - wanted):
        wait_for_orphan(runs / name, stop)
        _move(name, runs, aside)
    for name in sorted(_names(aside) & wanted - _names(runs)):
        wait_for_orphan(aside / name, stop)
        _move(name, aside, runs)
    return sorted(_names(aside))


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


def _names(folder: Path) -> set[str]:
    return {file.name.removesuffix(OVERRIDES) for file in folder.glob(f"*{OVERRIDES}")}


def _move(name: str, source: Path, target: Path) -> None:
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        # The file by which a run is found comes last.
        for path in (name + OUTPUT, name, name + OVERRIDES):
            if not (source / path).exists():
                continue
            if (target / path).is_dir():
                shutil.rmtree(target / path)
            (source / path).replace(target / path)
