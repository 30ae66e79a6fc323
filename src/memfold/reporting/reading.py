"""From folders on the disk to runs that can be compared."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from memfold.errors import InputError
from memfold.files import open_regular
from memfold.reporting.labels import join_backbones, label_methods, label_settings
from memfold.reporting.records import Problem, Run
from memfold.reporting.run_files import read_run_folder
from memfold.reporting.run_lines import read_run_lines
from memfold.reporting.unlike_runs import (
    keep_first,
    natural,
    sort_problems,
    warn_of_unequal_training,
)
from memfold.runs.folder import (
    CHOICES,
    HYDRA_FOLDER,
    OTHERS,
    OUTPUT,
    OVERRIDES,
    PACKED,
    RESULT,
    ROUNDS,
    SWEEP_PLAN,
)
from memfold.runs.sweep import SweepPlan, read_notes

__all__ = ["read"]

_INSIDE_RUNS = {PACKED, ROUNDS, "checkpoints", "wandb"}
_STUDY = "study.db"
_MAX_PRINTED = 2**24
_TRIALS = "trials"


def read(
    paths: Iterable[Path | str], *, is_joined: bool = False
) -> tuple[list[Run], list[Problem]]:
    """Read every run that is found.

    Args:
        paths: Run folders, sweep folders, folders that contain such at any depth, and the
            `runs.jsonl` of earlier reports. Of a tuning study, the runs of its test are read, not
            those of its trials; of `scripts/compare.py`, neither those that were tried for a choice
            nor those that it has put aside.
        is_joined: Whether backbones on the same data share a setting (`join_backbones`).

    Returns:
        The runs, with their methods named; and what is wrong: runs that are left out (without a
        usable result, failed, missing from a sweep, a seed twice), and runs that are not what a
        reader would expect. The same folder given twice is read once.
    """
    runs: dict[object, Run] = {}
    problems: list[Problem] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.is_file():
            found, wrong = read_run_lines(path, _name(path))
        elif path.is_dir():
            found, wrong = _read_folder(path, seen)
        else:
            found, wrong = [], [Problem(_name(path), "does not exist")]
        for run in found:
            runs.setdefault(_identity(run), run)
        problems += wrong
    labelled = label_methods(label_settings(sorted(runs.values(), key=_by_folder)))
    kept, repeated = keep_first(labelled)
    kept = join_backbones(kept) if is_joined else kept
    problems += [*repeated, *warn_of_unequal_training(kept)]
    return sorted(kept, key=_by_method), sort_problems(problems)


def _read_folder(root: Path, seen: set[Path]) -> tuple[list[Run], list[Problem]]:
    runs: list[Run] = []
    problems: list[Problem] = []
    folders: list[Path] = []

    def report(error: OSError) -> None:
        reason = f"cannot be read: {error.strerror or error}"
        problems.append(Problem(_name(Path(error.filename)), reason))

    walked: set[Path] = set()
    for path, subfolders, files in os.walk(root, onerror=report, followlinks=True):
        folder = Path(path)
        if folder.resolve() in walked:  # a link back
            subfolders.clear()
            continue
        walked.add(folder.resolve())
        is_run = RESULT in files or HYDRA_FOLDER in subfolders
        if is_run:
            folders.append(folder)
        if SWEEP_PLAN in files:
            started, wrong = _read_plan(folder)
            folders += started
            problems += wrong
        problems += [
            Problem(_name(folder / name), _why_no_folder(folder / (name + OUTPUT)))
            for name in (file.removesuffix(OVERRIDES) for file in files if file.endswith(OVERRIDES))
            if name not in subfolders
        ]
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and not (is_run and name in _INSIDE_RUNS)
            and not (name == _TRIALS and _STUDY in files)
            and not (name in (CHOICES, OTHERS) and f"{CHOICES}.csv" in files)
            and not ((folder / name).is_symlink() and not _is_compared(folder / name))
        )
    if not folders and not problems:
        problems.append(Problem(_name(root), "holds no run"))
    for folder in folders:
        resolved = folder.resolve()
        if resolved not in seen:
            seen.add(resolved)
            found, wrong = read_run_folder(folder, _name(folder))
            runs += found
            problems += wrong
    return runs, problems


def _why_no_folder(printed: Path) -> str:
    """Say why a run of a study has started left no folder."""
    try:
        with open_regular(printed) as file:
            lines = file.read(_MAX_PRINTED).decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"failed: {errors[-1]}" if errors else "no run folder: not started, or failed at once"


def _is_compared(folder: Path) -> bool:
    """Tell a link to a run or a sweep from one that may lead anywhere."""
    return any((folder / name).exists() for name in (RESULT, HYDRA_FOLDER, SWEEP_PLAN))


def _read_plan(sweep: Path) -> tuple[Sequence[Path], list[Problem]]:
    try:
        plan = SweepPlan.read(sweep / SWEEP_PLAN)
    except InputError as error:
        reason = f"{error}: jobs that never started are not known"
        return (), [Problem(_name(sweep), reason)]
    notes = read_notes(sweep)
    # A job that would repeat an earlier one is not run.
    there = {str(note.number) for note in notes} | plan.repeats.keys()
    return [sweep / note.folder for note in notes], [
        Problem(_name(sweep), f"missing: job {number} never started ({' '.join(overrides)})")
        for number, overrides in enumerate(plan.jobs or ())
        if str(number) not in there
    ]


def _name(path: Path) -> str:
    """Name a path as a reader of the report would find it: from here, if it is below."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()


def _identity(run: Run) -> object:
    """Tell a run that was read before from another one of the same name, made elsewhere."""
    place = Path(run.folder).resolve()
    return place, run.strategy, run.seed, run.bits, run.test, run.stored_bytes, run.fit_seconds


def _by_folder(run: Run) -> tuple[object, ...]:
    return natural(run.folder), -run.bits


def _by_method(run: Run) -> tuple[object, ...]:
    kind, value = run.request
    return run.setting, run.method, -run.bits, kind, -value, run.seed, natural(run.folder)
