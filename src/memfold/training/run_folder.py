"""The names of what a run leaves behind, and when a folder may be used."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from memfold.errors import InputError

__all__ = [
    "ARTIFACT",
    "HYDRA_FOLDER",
    "LAST_CHECKPOINT",
    "LOCK",
    "METRICS",
    "OUTPUT",
    "OVERRIDES",
    "PACKED",
    "RESULT",
    "ROUNDS",
    "locked",
    "read_result",
    "refuse_used_folder",
    "remove_partial_files",
    "replacing",
    "sync_folder",
    "write_text_atomically",
    "writing",
]

log = logging.getLogger(__name__)

HYDRA_FOLDER = ".hydra"
RESULT = "result.json"
METRICS = "metrics.csv"
ARTIFACT = "model.safetensors"
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
ROUNDS = "rounds"
LOCK = ".lock"
PACKED = "packed"
"""Folder of a folder for each number of bits that the values were packed into later."""
OUTPUT = ".txt"
"""Ending of the file beside a run folder that holds what the run printed, where it was launched."""
OVERRIDES = ".overrides.json"
"""Ending of the file beside it that holds what the run was started with."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a lack of permission into one line.

    Raises:
        InputError: The block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`. The kernel opens the lock when this one is killed.

    Raises:
        InputError: Another process has the lock, or the folder cannot be written.
    """
    with writing(folder / LOCK):
        file = (folder / LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder} is in use by another process; wait for it or choose another folder"
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        yield


def read_result(folder: Path) -> dict[str, object]:
    """Return the contents of `result.json`; empty when there is none that can be read."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def refuse_used_folder(folder: Path, key: str = "hydra.run.dir") -> None:
    """Check that a new run in `folder` would overwrite no result and no checkpoint.

    Args:
        folder: A run folder, which need not exist.
        key: The configuration key that chose it, for the message.

    Raises:
        InputError: There is a completed run, or one that can be resumed.
    """
    if read_result(folder).get("status") == "completed":
        raise InputError(
            f"{key}={folder} holds a completed run; choose another folder, "
            "or train it further with resume= and a larger trainer.max_epochs"
        )
    # Between two rounds a run has no checkpoint of its own.
    if (folder / LAST_CHECKPOINT).exists() or (folder / ROUNDS / "0").exists():
        raise InputError(
            f"{key}={folder} holds an unfinished run; continue it with resume={folder}, "
            "or choose another folder"
        )


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that a reader finds the old or the new contents, never a part.

    The block gets an open file beside `path`, which takes its place once it is on the disk. Not
    even a power cut loses both.

    Raises:
        InputError: The file cannot be written; it is then what it was.
    """
    # One name for all attempts: what a killed run left is overwritten, not collected.
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk; file systems that cannot are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove what `replacing` and others have left of a run that was killed.

    Raises:
        InputError: A file cannot be removed.
    """
    for path in folder.rglob("*.partial"):
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file as `replacing` does.

    Raises:
        InputError: The file cannot be written; it is then what it was.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
