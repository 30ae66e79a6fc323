"""What a sweep says: a line per job, and the table at the end."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memfold.training.run_folder import read_result
from memfold.training.sweeps.folder import JobNote, Plan, read_notes

__all__ = ["describe_end", "print_table"]

_COMPLETED = "completed"
_MISSING = "missing"


def describe_end(result: dict[str, object], seconds: float | None) -> str:
    """Say in one line how a job ended.

    Args:
        result: Contents of its `result.json`; empty when it has none.
        seconds: How long it took.
    """
    if result.get("status") != _COMPLETED:
        return f"failed: {result.get('error', 'it left no result')}"
    facts = [_COMPLETED]
    accuracy, stored = _find(result, "metrics", "test/acc"), _find(result, "memory", "stored_bytes")
    if isinstance(accuracy, float):
        facts.append(f"test/acc {accuracy:.4f}")
    if isinstance(stored, int):
        facts.append(f"{stored:,} bytes")
    if seconds is not None:
        facts.append(f"{seconds:.1f} s")
    return ", ".join(facts)


def print_table(sweep: Path, plan: Plan) -> tuple[int, int, int]:
    """List every job, also those that were planned and never started.

    Returns:
        The numbers of jobs, of failed ones, and of those without any result.
    """
    notes = {note.number: note for note in read_notes(sweep)}
    numbers = sorted({*notes, *range(len(plan.jobs or ()))})
    table = Table(title=f"{len(numbers)} jobs in {sweep}")
    for column in ("job", "compression", "ratio", "seed", "status", "test/acc", "stored bytes"):
        table.add_column(column)
    statuses = []
    for number in numbers:
        note = notes.get(number)
        result = {} if note is None else read_result(sweep / note.folder)
        overrides = plan.jobs[number] if note is None and plan.jobs else _overrides(note)
        given = {text.partition("=")[0]: text.partition("=")[2] for text in overrides}
        statuses.append(str(result.get("status", _MISSING)))
        table.add_row(
            str(number) if note is None else note.folder,
            _text(_find(result, "compression", "name") or given.get("compression")),
            _text(_find(result, "compression", "ratio") or given.get("ratio")),
            _text(_find(result, "seed") if result else given.get("seed")),
            statuses[-1],
            _text(_find(result, "metrics", "test/acc")),
            _text(_find(result, "memory", "stored_bytes")),
        )
    Console(file=sys.stdout).print(table)
    num_missing = statuses.count(_MISSING)
    return len(statuses), len(statuses) - statuses.count(_COMPLETED) - num_missing, num_missing


def _overrides(note: JobNote | None) -> Sequence[str]:
    return () if note is None else note.overrides


def _find(result: dict[str, object], *keys: str) -> object:
    value: object = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
