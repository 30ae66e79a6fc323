"""The names of what a run leaves behind, and when a folder may be used."""

import os
import shutil
from pathlib import Path

from memfold.errors import InputError
from memfold.files import read_json, writing

__all__ = [
    "ARTIFACT",
    "CHOICES",
    "HYDRA_FOLDER",
    "JOB_NOTES",
    "LAST_CHECKPOINT",
    "LOCK",
    "METRICS",
    "OTHERS",
    "OUTPUT",
    "OVERRIDES",
    "PACKED",
    "RESULT",
    "ROUNDS",
    "RUNS",
    "SWEEP_PLAN",
    "can_be_resumed",
    "is_completed",
    "read_result",
    "refuse_odd_files",
    "refuse_used_folder",
    "remove_partial_files",
]

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
CHOICES = "choices"
"""Folder, in a comparison, of the runs that are only tried on validation, beside `choices.csv`."""
OTHERS = "other_runs"
"""Folder of the runs that were compared by another plan, or with other choices."""
RUNS = "runs"
"""Folder of the runs that are compared."""
SWEEP_PLAN = "sweep.json"
"""In the folder of a sweep, what it is to run."""
JOB_NOTES = Path(".sweep", "jobs")
"""Folder beside it of a note for each job that was started."""


def refuse_odd_files(folder: Path) -> None:
    """Check that a run in `folder` would read and write regular files in it, and no others.

    W&B's own folder has links to W&B's logs; a resumed run writes to none of the files there.

    Raises:
        InputError: There is a pipe or a device, or a link that leads out of the folder.
    """
    inside = os.path.realpath(folder)
    for path, folders, files in os.walk(folder):
        for entry in (Path(path, name) for name in (*folders, *files)):
            target = Path(os.path.realpath(entry))
            if not target.is_relative_to(inside):
                raise InputError(f"{entry} is a link that leads out of the run folder: remove it")
            if target.exists() and not (target.is_file() or target.is_dir()):
                raise InputError(f"{entry} is no regular file: remove it")
        if Path(path) == folder:
            folders[:] = [name for name in folders if name != "wandb"]


def read_result(folder: Path) -> dict[str, object]:
    """Return the contents of `result.json`; empty when there is none that can be read."""
    try:
        result = read_json(folder / RESULT)
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def is_completed(folder: Path) -> bool:
    """Tell whether the run in `folder` has come to its end, with a result."""
    return read_result(folder).get("status") == "completed"


def can_be_resumed(folder: Path) -> bool:
    """Tell whether an unfinished run in `folder` has saved anything to go on from."""
    # Between two rounds a run has no checkpoint of its own.
    return (folder / LAST_CHECKPOINT).exists() or (folder / ROUNDS / "0").exists()


def refuse_used_folder(folder: Path, key: str = "hydra.run.dir") -> None:
    """Check that a new run in `folder` would overwrite no result and no checkpoint.

    Args:
        folder: A run folder, which need not exist.
        key: The configuration key that chose it, for the message.

    Raises:
        InputError: There is a completed run, or one that can be resumed.
    """
    if is_completed(folder):
        raise InputError(
            f"{key}={folder} holds a completed run; choose another folder, "
            "or train it further with resume= and a larger trainer.max_epochs"
        )
    if can_be_resumed(folder):
        raise InputError(
            f"{key}={folder} holds an unfinished run; continue it with resume={folder}, "
            "or choose another folder"
        )


def remove_partial_files(folder: Path) -> None:
    """Remove what `replacing` and others have left of a run that was killed.

    Raises:
        InputError: A file cannot be removed.
    """
    for path in folder.rglob("*.partial"):
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
