"""The jobs that a sweep has planned, whether they ran or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memfold.errors import InputError
from memfold.file_models import Text, check
from memfold.reporting.records import Count
from memfold.reporting.run_files import load_json
from memfold.runs.folder import JOB_NOTES, SWEEP_PLAN

__all__ = ["SweepJobs", "read_sweep_folder"]


@dataclass
class _Plan:
    """What a report needs of it; the same of a note."""

    jobs: list[list[str]] | None = None
    repeats: dict[str, int] | None = None


@dataclass
class _Note:
    number: Count
    folder: Text


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
        InputError: The plan cannot be read.
    """
    plan = check(_Plan, load_json(folder / SWEEP_PLAN), SWEEP_PLAN)
    folders: dict[int, Path] = {}
    for file in (folder / JOB_NOTES).glob("*.json"):
        try:
            note = check(_Note, load_json(file))
            folders[note.number] = folder / note.folder
        except InputError:  # as if the job had not started: its line says that it is missing
            continue
    planned = dict(enumerate(plan.jobs or []))
    for number in planned.keys() - folders.keys():
        if str(number) in (plan.repeats or {}):  # an earlier job is the same run
            del planned[number]
    missing = {number: " ".join(planned[number]) for number in planned.keys() - folders.keys()}
    return SweepJobs(tuple(folders.values()), dict(sorted(missing.items())))
