"""The jobs that a sweep has planned, whether they ran or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memfold.reporting.fields import Fields, UnusableError
from memfold.reporting.run_files import load_json

__all__ = ["PLAN", "SweepJobs", "read_sweep_folder"]

# `memfold.studies.sweep_folder` writes both; importing it would take Hydra's libraries.
PLAN = "sweep.json"
_NOTES = Path(".sweep", "jobs")


@dataclass(frozen=True)
class SweepJobs:
    """What became of the plan of a sweep."""

    folders: tuple[Path, ...]
    """Of the jobs that were started."""
    never_started: Mapping[int, str]
    """Number of a job -> its overrides."""


def read_sweep_folder(folder: Path) -> SweepJobs:
    """Read the plan of a sweep, and the notes on the jobs that it started.

    Raises:
        UnusableError: The plan cannot be read.
    """
    plan = Fields(load_json(folder / PLAN))
    jobs = plan.values.get("jobs")
    if jobs is not None and not (isinstance(jobs, list) and all(map(_is_texts, jobs))):
        raise UnusableError(f"{PLAN}: jobs must be lists of overrides")
    folders: dict[int, Path] = {}
    for file in (folder / _NOTES).glob("*.json"):
        try:
            note = Fields(load_json(file))
            folders[note.integer("number", 0)] = folder / note.text("folder")
        except UnusableError:  # as if the job had not started: its line says that it is missing
            continue
    planned = dict(enumerate(jobs or []))
    repeats = Fields(plan.values.get("repeats") or {}, "repeats").values
    for number in planned.keys() - folders.keys():
        if str(number) in repeats:  # an earlier job is the same run
            del planned[number]
    missing = {number: " ".join(planned[number]) for number in planned.keys() - folders.keys()}
    return SweepJobs(tuple(folders.values()), dict(sorted(missing.items())))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
