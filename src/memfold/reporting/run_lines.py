"""`runs.jsonl`: a run or a problem a line, from which a report can be drawn anew."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from memfold.errors import InputError
from memfold.file_models import check
from memfold.files import open_regular, parse_json
from memfold.reporting.metrics import columns
from memfold.reporting.records import Comparison, Problem, Run, Setting, value_types
from memfold.runs.primary import ACCURACY

__all__ = ["RUN_LINES", "read_run_lines", "to_run_lines"]

RUN_LINES = "runs.jsonl"
_LONGEST_LINE = 2**24
_KIND = "kind"
_RUN, _PROBLEM = "run", "problem"
_Kind: Any = Literal["run", "problem"]


def to_run_lines(comparison: Comparison) -> str:
    """Write all runs and problems, without loss; published curves have a file of their own."""
    objects = [{_KIND: _RUN, **_named(run)} for run in comparison.runs]
    objects += [{_KIND: _PROBLEM, **dataclasses.asdict(p)} for p in comparison.problems]
    return "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in objects)


def read_run_lines(path: Path, name: str) -> tuple[list[Run], list[Problem]]:
    """Read what `to_run_lines` wrote. A line that is damaged is a problem, a file of such is one.

    Args:
        path: The file.
        name: What it is called in a report.
    """
    runs, problems, damaged = [], [], []
    try:
        lines = list(_lines(path))
    except OSError as error:
        return [], [Problem(name, f"cannot be read: {error.strerror or error}")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = check(dict[str, Any], _load(line), "a line")
            if check(_Kind, content.get(_KIND), _KIND) == _RUN:
                runs.append(_parse(content))
            else:
                problems.append(check(Problem, content))
        except InputError as error:
            damaged.append(Problem(f"{name} line {number}", str(error)))
    if damaged and not (runs or problems):
        return [], [Problem(name, f"holds no line of a {RUN_LINES}: {damaged[0].reason}")]
    return runs, problems + damaged


def _named(run: Run) -> dict[str, Any]:
    """Return the fields of a run, with its values under the name of their metric."""
    content = dataclasses.asdict(run)
    if run.setting.primary == ACCURACY:  # as before there were others
        del content["setting"]["primary"]
    for key, nothing in (("network", None), ("source", {}), ("fold", None)):  # of few
        if content[key] == nothing:
            del content[key]
    test, val = columns(run.setting.primary)
    names = {"test": test, "val": val}
    return {names.get(key, key): value for key, value in content.items()}


def _parse(content: Mapping[str, Any]) -> Run:
    """Undo `_named`.

    Raises:
        InputError: A value is missing or cannot be right.
    """
    primary = check(Setting, content.get("setting"), "setting").primary
    named = zip(("test", "val"), columns(primary), value_types(primary), strict=True)
    values = {field: check(kind, content.get(name), name) for field, name, kind in named}
    return check(Run, {**content, **values})


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines; one that is too long is cut, and nothing behind it is read."""
    with open_regular(path) as file:
        while line := file.readline(_LONGEST_LINE):
            yield line
            if len(line) == _LONGEST_LINE:
                return


def _load(line: bytes) -> object:
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"truncated or no JSON ({error})") from error
