"""The tables of a results.json: Markdown for a file, and the same for the screen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from memfold.benchmarking.results import Entry, by_group

__all__ = ["print_tables", "to_markdown"]


@dataclass(frozen=True)
class _Column:
    title: str
    metric: str
    show: Callable[[float], str]
    spread: bool = False
    """Whether the smallest and largest of the rounds are shown too."""
    relative: bool = False
    """Whether it is the ratio to dense."""
    with_relative: bool = False
    """Whether the ratio to dense follows."""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _ratio(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def _and_ratio(title: str, metric: str, show: Callable[[float], str]) -> _Column:
    return _Column(title, metric, show, with_relative=True)


_SECTIONS = (
    (
        "training step (smallest-largest of the rounds)",
        (
            _Column("ms", "step_seconds", _milliseconds, spread=True),
            _Column("x dense", "step_seconds", _ratio, spread=True, relative=True),
            _Column("x dense, step by step", "turn_ratio", _ratio),
            _Column("first quartile", "turn_ratio_low", _ratio),
            _Column("third", "turn_ratio_high", _ratio),
            _Column("samples/s", "samples_per_second", _count),
            _Column("build, ms", "construction_seconds", _milliseconds),
        ),
    ),
    (
        "inference, ms (x dense)",
        (
            _and_ratio("batch 1", "latency_1_seconds", _milliseconds),
            _and_ratio("batch large", "latency_batch_seconds", _milliseconds),
            _and_ratio("densified, 1", "densified_latency_1_seconds", _milliseconds),
            _and_ratio("densified, large", "densified_latency_batch_seconds", _milliseconds),
        ),
    ),
    (
        "memory of a training step (x dense)",
        (
            _and_ratio("peak", "peak_bytes", _bytes),
            _and_ratio("train state", "train_state_bytes", _bytes),
            _and_ratio("saved for backward", "saved_bytes", _bytes),
        ),
    ),
    (
        "bytes of the train state, of what DDP reduces, and of the artifact",
        (
            _Column("parameters", "parameter_bytes", _bytes),
            _Column("gradients", "gradient_bytes", _bytes),
            _Column("optimizer", "optimizer_bytes", _bytes),
            _Column("DDP", "grad_sync_bytes", _bytes),
            _Column("artifact", "artifact_bytes", _bytes),
        ),
    ),
)


def to_markdown(results: dict[str, Any]) -> str:
    """Write all groups as Markdown tables, under the hardware and the versions."""
    lines = ["# Benchmark", "", f"    {results['command']}", ""]
    lines += [f"- {line}" for line in _facts(results)]
    for group, entries in by_group(results):
        lines += ["", f"## {group}"]
        for title, columns in _sections(entries):
            heads = ["case", *(column.title for column in columns)]
            lines += [
                "",
                f"{title[0].upper()}{title[1:]}:",
                "",
                _row(heads),
                _row(["---"] * len(heads)),
            ]
            lines += [_row([e["name"], *_cells(e, columns)]) for e in _completed(entries)]
        lines += ["", *_failures(entries)] if _failures(entries) else []
    return "\n".join(lines) + "\n"


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Print hardware, versions and all tables."""
    for line in _facts(results):
        console.print(line, highlight=False, markup=False)
    for group, entries in by_group(results):
        for title, columns in _sections(entries):
            table = Table(title=f"{group}:\n{title}", title_justify="left")
            table.add_column("case", overflow="fold", min_width=12)
            for column in columns:
                table.add_column(column.title, justify="right")
            for entry in _completed(entries):
                table.add_row(entry["name"], *_cells(entry, columns))
            console.print(table)
        for line in _failures(entries):
            console.print(line, style="red", highlight=False, markup=False)


def _facts(results: dict[str, Any]) -> list[str]:
    facts = [f"{key}: {value}" for key, value in results["environment"].items()]
    return [
        *facts,
        f"rounds: {results['rounds']}; shown are medians over them",
        "x dense: divided by the dense model's number in the same round",
    ]


def _sections(entries: Sequence[Entry]) -> list[tuple[str, list[_Column]]]:
    """Return the sections of a group, each with the columns that a case has a number for."""
    return [
        (title, [c for c in columns if any(c.metric in e["measured"] for e in entries)])
        for title, columns in (_SECTIONS if _completed(entries) else ())
    ]


def _completed(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["status"] == "completed"]


def _failures(entries: Sequence[Entry]) -> list[str]:
    failed = [entry for entry in entries if entry["status"] == "failed"]
    return [f"failed: {entry['name']}: {entry['error']}" for entry in failed]


def _cells(entry: Entry, columns: Sequence[_Column]) -> list[str]:
    return [_cell(entry, column) for column in columns]


def _cell(entry: Entry, column: _Column) -> str:
    values = entry["relative" if column.relative else "measured"].get(column.metric)
    if values is None:
        return "-"
    text = column.show(values["median"])
    if column.spread and values["min"] < values["max"]:
        text += f" ({column.show(values['min'])}-{column.show(values['max'])})"
    ratio = entry["relative"].get(column.metric)
    if column.with_relative and ratio is not None:
        text += f" ({_ratio(ratio['median'])} x)"
    return text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
