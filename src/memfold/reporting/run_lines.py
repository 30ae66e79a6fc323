"""`runs.jsonl`: a run or a problem a line, from which a report can be drawn anew."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from memfold.files import open_regular, parse_json
from memfold.reporting.fields import SMALLEST_RATIO, Fields, UnusableError
from memfold.reporting.records import Comparison, Curve, Problem, Run, Setting
from memfold.reporting.run_files import MAX_STEPS

__all__ = ["RUN_LINES", "read_run_lines", "to_run_lines"]

RUN_LINES = "runs.jsonl"
_LONGEST_LINE = 2**24
_KIND = "kind"
_RUN, _PROBLEM = "run", "problem"


def to_run_lines(comparison: Comparison) -> str:
    """Write all runs and problems, without loss; published curves have a file of their own."""
    objects = [{_KIND: _RUN, **dataclasses.asdict(run)} for run in comparison.runs]
    objects += [{_KIND: _PROBLEM, **dataclasses.asdict(p)} for p in comparison.problems]
    return "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in objects)


def read_run_lines(path: Path, name: str) -> tuple[list[Run], list[Problem]]:
    """Read what `to_run_lines` wrote. A line that is damaged becomes a problem.

    Args:
        path: The file.
        name: What it is called in a report.
    """
    runs, problems = [], []
    try:
        lines = list(_lines(path))
    except OSError as error:
        return [], [Problem(name, f"cannot be read: {error.strerror or error}")]
    if lines and not _is_text(lines[0]):
        return [], [Problem(name, "is no text")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = Fields(_load(line))
            kind = fields.text(_KIND)
            if kind == _RUN:
                runs.append(_run(fields))
            elif kind == _PROBLEM:
                problems.append(Problem(fields.text("folder"), fields.text("reason")))
            else:
                raise UnusableError(f"{_KIND} must be {_RUN} or {_PROBLEM}, not {kind!r}")
        except UnusableError as error:
            problems.append(Problem(f"{name} line {number}", str(error)))
    return runs, problems


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines; one that is too long is cut, and nothing behind it is read."""
    with open_regular(path) as file:
        while line := file.readline(_LONGEST_LINE):
            yield line
            if len(line) == _LONGEST_LINE:
                return


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except ValueError:
        return False
    return True


def _load(line: bytes) -> object:
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise UnusableError(f"truncated or no JSON ({error})") from error


def _run(fields: Fields) -> Run:
    """Check a line as a `result.json` is checked: it may have been written by hand."""
    setting, curves = fields.section("setting"), fields.section("curves")
    densities = fields.section("densities")
    return Run(
        folder=fields.text("folder"),
        setting=Setting(setting.text("data"), setting.text("backbone")),
        strategy=fields.text("strategy"),
        method=fields.text("method"),
        seed=fields.integer("seed", 0),
        ratio=fields.number("ratio", SMALLEST_RATIO),
        requested_ratio=fields.number_or_none("requested_ratio", SMALLEST_RATIO, 1),
        budget_bytes=fields.integer_or_none("budget_bytes", 1),
        bits=fields.integer("bits", 1),
        accuracy=fields.number("accuracy", 0, 1),
        val_accuracy=fields.number_or_none("val_accuracy", 0, 1),
        stored_bytes=fields.integer("stored_bytes", 1),
        index_bytes=fields.integer_or_none("index_bytes", 0),
        dense_bytes=fields.integer("dense_bytes", 1),
        train_state_bytes=fields.integer_or_none("train_state_bytes", 0),
        peak_bytes=fields.integer_or_none("peak_bytes", 0),
        fit_seconds=fields.number_or_none("fit_seconds", 0),
        step_seconds=fields.number_or_none("step_seconds", 0),
        epochs=fields.number_or_none("epochs", 0),
        steps=fields.integer_or_none("steps", 0),
        options=dict(fields.section("options").values),
        recipe=dict(Fields(fields.values.get("recipe") or {}, "recipe").values),
        environment=dict(fields.section("environment").values),
        command=str(fields.values.get("command") or ""),
        curves={key: _curve(curves.section(key)) for key in curves.values},
        densities={key: densities.number(key, 0, 1) for key in densities.values},
    )


def _curve(fields: Fields) -> Curve:
    steps, values = fields.values.get("steps"), fields.values.get("values")
    if not isinstance(steps, list) or not isinstance(values, list) or len(steps) != len(values):
        raise UnusableError("a curve must have as many steps as values")
    if not all(type(step) is int and 0 <= step < MAX_STEPS for step in steps):
        raise UnusableError("the steps of a curve must be whole numbers")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise UnusableError("the values of a curve must be finite numbers")
    return Curve(tuple(steps), tuple(map(float, values)))
