"""Locks on files, which the kernel opens when their holder is killed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from memfold.errors import InputError
from memfold.file_lock import take_lock
from memfold.files import open_regular, writing
from memfold.runs.folder import LOCK

__all__ = ["is_held", "lock_for_job", "locked", "try_lock", "wait_for_lock"]

log = logging.getLogger(__name__)
_for_jobs: dict[Path, IO[Any]] = {}


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, after waiting for whoever has it.

    Raises:
        InputError: The folder cannot be written, or its file system has no locks.
    """
    with _open(path) as file:
        _lock(file, waits=True)
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock at `path`; yield whether nobody else had it.

    Raises:
        InputError: The folder cannot be written, or its file system has no locks.
    """
    with _open(path) as file:
        yield _lock(file, waits=False)


def is_held(path: Path) -> bool:
    """Tell whether a living process has the lock at `path`, which need not exist.

    Raises:
        InputError: The folder cannot be written, or its file system has no locks.
    """
    if not path.exists():
        return False
    with try_lock(path) as is_free:
        return not is_free


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`. The kernel opens the lock when this one is killed.

    Raises:
        InputError: Another process has the lock, or the folder cannot be written.
    """
    with _for_jobs.pop(folder.resolve(), None) or _lock_folder(folder):
        yield


def lock_for_job(folder: Path) -> None:
    """Lock `folder` now for the `locked` that follows in this process.

    Raises:
        InputError: As `locked`.
    """
    _for_jobs[folder.resolve()] = _lock_folder(folder)


def _lock_folder(folder: Path) -> IO[Any]:
    with writing(folder / LOCK):
        file = open_regular(folder / LOCK, "a")
    try:
        is_free = take_lock(file, waits=False)
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        return file
    if not is_free:
        file.close()
        raise InputError(
            f"{folder} is in use by another process; wait for it or choose another folder"
        )
    return file


def _open(path: Path) -> IO[Any]:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_regular(path, "a")


def _lock(file: IO[Any], *, waits: bool) -> bool:
    try:
        return take_lock(file, waits=waits)
    except OSError as error:  # SQLite would not work there, either
        raise InputError(
            f"{file.name} cannot be locked ({error.strerror}); put the folder on a file system "
            "that has locks"
        ) from error
