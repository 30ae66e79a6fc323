"""The names of what a run leaves behind, and when a folder may be used."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfold.errors import InputError

__all__ = [
    "ARTIFACT",
    "HYDRA_FOLDER",
    "LAST_CHECKPOINT",
    "LOCK",
    "METRICS",
    "RESULT",
    "ROUNDS",
    "locked",
    "read_result",
    "refuse_used_folder",
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


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new contents, never a part.

    Raises:
        InputError: The file cannot be written; it is then what it was.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
