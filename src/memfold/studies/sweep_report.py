"""What a sweep says: a line per job, and the table at the end."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memfold.runs.data_names import digest, source_of
from memfold.runs.folder import is_completed, read_result
from memfold.runs.primary import ACCURACY, Primary, is_near, primary_of
from memfold.runs.sweep import SweepPlan, read_notes

__all__ = ["describe_end", "print_table", "report_command", "upload_command"]

_COMPLETED = "completed"
_MISSING = "missing"
_WIDEST_TABLE = 1000  # characters
_OWN_COLUMNS = ("compression", "ratio", "seed")


def describe_end(result: Mapping[str, Any], seconds: float) -> str:
    """Say in one line how a job ended.

    Args:
        result: Contents of its `result.json`; empty when it has none.
        seconds: How long it took.
    """
    if result.get("status") != _COMPLETED:
        return f"failed: {result.get('error', 'it left no result')}"
    facts = [_COMPLETED]
    primary = primary_of(result)
    value, stored = _tested(result, primary), _stored(result)
    if value is not None:
        facts.append(f"{primary.test} {primary.show(value)}")
    if stored is not None:
        facts.append(f"{stored} bytes")
    return ", ".join([*facts, f"{seconds:.1f} s"])


def print_table(sweep: Path, plan: SweepPlan) -> tuple[int, int, int]:
    """List every job, also those that were planned and never started.

    Returns:
        The numbers of jobs, of failed ones, and of those without any result; jobs that repeat
        another are not counted.
    """
    notes = {note.number: note for note in read_notes(sweep)}
    given = dict(enumerate(map(_by_key, plan.jobs or ())))
    given |= {number: _by_key(note.overrides) for number, note in notes.items()}
    swept = _swept_keys(list(given.values()))
    results = {number: read_result(sweep / note.folder) for number, note in notes.items()}
    # One, unless the data differ from job to job.
    metrics = sorted({primary_of(r) for r in results.values() if r.get("primary")}) or [ACCURACY]
    data = {digest((str(r.get("data")), source_of(r))) for r in results.values() if r}
    # On other data, a better value says nothing.
    best = {m: _best(results.values(), m) if len(data) == 1 else None for m in metrics}
    table = Table(title=f"{len(given)} jobs in {sweep}")
    for column in ("job", *_OWN_COLUMNS, *swept):
        table.add_column(column, overflow="fold")
    for column in ("status", *map(_head, metrics), "stored bytes"):
        table.add_column(column, no_wrap=True)
    statuses = []
    for number, values in sorted(given.items()):
        note, result = notes.get(number), results.get(number, {})
        if note is None and str(number) in plan.repeats:
            status = f"is job {plan.repeats[str(number)]}"
        else:
            status = str(result.get("status", _MISSING))
            statuses.append(status)
        table.add_row(
            str(number) if note is None else note.folder,
            _text(_section(result, "compression").get("name") or values.get("compression")),
            _ratio(result) or _text(values.get("ratio")),
            _text(result.get("seed", values.get("seed"))),
            *(_text(values.get(key)) for key in swept),
            status,
            *(_mark(_tested(result, metric), metric, best[metric]) for metric in metrics),
            _text(_stored(result)),
        )
    console = Console(file=sys.stdout)
    if not console.is_terminal:  # whoever reads a file can scroll
        unlimited = console.options.update(max_width=_WIDEST_TABLE)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
    num_missing = statuses.count(_MISSING)
    return len(statuses), len(statuses) - statuses.count(_COMPLETED) - num_missing, num_missing


def upload_command(sweep: Path) -> str | None:
    """Return the command that uploads all W&B runs of the sweep that were written offline.

    Args:
        sweep: The sweep's folder.

    Returns:
        One line for a shell; `None` when there is nothing to upload.
    """
    folders = [note.folder for note in read_notes(sweep)]
    is_waiting = {
        len(Path(folder).parts)
        for folder in folders
        for run in (sweep / folder).glob("wandb/offline-run-*")
        if not any(run.glob("*.wandb.synced"))
    }
    if not is_waiting:
        return None
    root = shlex.quote(str(sweep))
    patterns = [f"{root}/{'*/' * depth}wandb/offline-run-*" for depth in sorted(is_waiting)]
    return " ".join(["wandb", "sync", *patterns])


def report_command(sweep: Path, program: Path) -> str | None:
    """Return the command that compares the jobs of the sweep.

    Args:
        sweep: The sweep's folder.
        program: `train.py`.

    Returns:
        One line for a shell; `None` without a completed job, or without `scripts/` beside the
        program.
    """
    script = program.with_name("scripts") / "report.py"
    has_any = any(is_completed(sweep / note.folder) for note in read_notes(sweep))
    if not (script.is_file() and has_any):
        return None
    return shlex.join(["python", str(script), str(sweep), "--out", str(sweep / "report")])


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    parts = (text.lstrip("+").partition("=") for text in overrides)
    return {key: value for key, _, value in parts}


def _swept_keys(given: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys in which jobs differ, without those that have a column anyway."""
    keys = dict.fromkeys(key for values in given for key in values)
    return [
        key
        for key in keys
        if key not in _OWN_COLUMNS and len({values.get(key) for values in given}) > 1
    ]


def _section(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a result; empty where it has none, or an old one something else."""
    section = result.get(name)
    return section if isinstance(section, Mapping) else {}


def _tested(result: Mapping[str, Any], metric: Primary) -> float | None:
    value = metric.tested(_section(result, "metrics"))
    return value if isinstance(value, float) else None


def _stored(result: Mapping[str, Any]) -> str | None:
    stored = _section(result, "memory").get("stored_bytes")
    return f"{stored:,}" if isinstance(stored, int) else None


def _best(results: Iterable[Mapping[str, Any]], metric: Primary) -> float | None:
    """Return the best value; `None` where there are not two to choose from."""
    values = [value for result in results if (value := _tested(result, metric)) is not None]
    return max(values, key=lambda value: metric.sign * value) if len(set(values)) > 1 else None


def _head(metric: Primary) -> str:
    return f"{metric.test} ({'higher' if metric.sign > 0 else 'lower'} is better)"


def _mark(value: float | None, metric: Primary, best: float | None) -> str:
    return metric.show(value) + (" best" if value is not None and value == best else "")


def _ratio(result: Mapping[str, Any]) -> str | None:
    """Return what was asked for, or else what came out; both where they are far apart."""
    compression = _section(result, "compression")
    found, asked = compression.get("ratio"), compression.get("requested_ratio")
    if not isinstance(found, int | float):
        return None
    if not isinstance(asked, int | float):
        return f"{found:.3g}"
    return f"{asked:.3g}" + (f" (is {found:.3g})" if not is_near(found, asked) else "")


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
