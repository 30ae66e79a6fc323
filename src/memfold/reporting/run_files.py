"""One run folder: its `result.json`, the packed ones below it, and its `metrics.csv`."""

import csv
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, get_type_hints

from memfold.errors import InputError
from memfold.file_models import check
from memfold.files import open_regular, read_json
from memfold.reporting.records import MAX_STEPS, Curve, Problem, Run, Setting, value_types
from memfold.runs.data_names import source_of
from memfold.runs.folder import METRICS, PACKED, RESULT
from memfold.runs.primary import primary_of

__all__ = ["MAX_POINTS", "load_json", "read_run_folder"]

MAX_POINTS = 200
"""Of a curve: more than a plot can show."""
_LONGEST_LINE = 2**20
_TYPES = get_type_hints(Run, include_extras=True)
_SECTIONS = ("compression", "metrics", "memory", "time")
_NUMBERS = {  # what a run takes from a section as it stands
    "compression": ("ratio", "requested_ratio", "budget_bytes", "bits"),
    "memory": (
        "stored_bytes",
        "index_bytes",
        "dense_bytes",
        "train_state_bytes",
        "peak_bytes",
    ),
    "time": ("fit_seconds", "step_seconds"),
    "training": ("epochs", "steps", "rounds"),
    "compute": ("operations",),
}
_NO_OPTIONS = (
    "name",
    "ratio",
    "requested_ratio",
    "budget_bytes",
    "bits",
    "seed",
    "index_format",
)
_CURVES = ("train/", "val/")
_DENSITY = "density/"
# What a sweep adds to the command of a job, and where a run is.
_OF_ONE_START = ("hydra.mode=", "hydra.run.dir=", "hydra.job.num=")
_OF_ONE_START += ("logger.group=", "logger.job_type=")
_OF_HYDRA = ("--config-name", "--config-path")


def read_run_folder(folder: Path, name: str) -> tuple[list[Run], list[Problem]]:
    """Read a run, and the same with its values packed into fewer bits, if there is any.

    Args:
        folder: The run folder.
        name: What it is called in a report.
    """
    try:
        run = _parse(load_json(folder / RESULT), name)
    except InputError as error:
        return [], [Problem(name, str(error))]
    problems = []
    try:
        curves, densities = _read_metrics(folder / METRICS)
        run = replace(run, curves=curves, densities=densities)
    except InputError as error:
        problems.append(Problem(name, f"{METRICS}: {error}; drawn without curves"))
    runs = [run]
    for packed in sorted((folder / PACKED).glob("*/")):
        try:
            further = _parse(load_json(packed / RESULT), name)
            if any(other.bits == further.bits for other in runs):
                raise InputError(f"{further.bits} bits are there already")
            if (further.epochs, further.steps) != (run.epochs, run.steps):
                raise InputError("packed before the run was trained further")
            # The bytes were asked for at the bits of the training.
            runs.append(replace(further, budget_bytes=None))
        except InputError as error:
            problems.append(Problem(f"{name}/{PACKED}/{packed.name}", str(error)))
    return runs, problems


def load_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no {path.name}") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path.name} cannot be read: {reason}") from error
    except ValueError as error:
        raise InputError(f"{path.name} is truncated or no JSON ({error})") from error


def _parse(result: object, name: str) -> Run:
    """Turn the contents of a result.json into a run, without curves.

    Raises:
        InputError: The run was not completed, or a value is missing or cannot be right.
    """
    values = check(dict[str, Any], result, "the contents")
    _refuse_unfinished(values)
    sections = {key: check(dict[str, Any], values.get(key), key) for key in _SECTIONS}
    sections |= {key: values.get(key) or {} for key in ("training", "compute")}  # not in older ones
    found = {
        name: check(_TYPES[name], sections[key].get(name), f"{key}.{name}")
        for key, names in _NUMBERS.items()
        for name in names
    }
    compression, metrics = sections["compression"], sections["metrics"]
    is_exact = found["bits"] == compression.get("untouched_bits", 32) == 32
    is_exact &= not compression.get("merge_norms", False)
    prefix = "" if is_exact else "packed/"
    is_best = not prefix and values.get("test_checkpoint") == "best"
    primary = primary_of(values)
    of_test, of_val = value_types(primary)
    test = f"{prefix}{primary.test}"
    val = f"val/best_{primary.short}" if is_best else f"{prefix}{primary.name}"
    setting = {key: values.get(key) for key in ("data", "backbone")}
    strategy = check(_TYPES["strategy"], compression.get("name"), "compression.name")
    if strategy == "dense":
        found |= {"requested_ratio": None, "budget_bytes": None}
    source = source_of(values)
    recipe = check(dict[str, Any], values.get("recipe") or {}, "recipe")
    return Run(
        folder=name,
        source={"data": setting["data"], **source} if source else {},
        setting=check(Setting, {**setting, "primary": primary}),
        strategy=strategy,
        method=strategy,
        seed=check(_TYPES["seed"], values.get("seed"), "seed"),
        fold=check(_TYPES["fold"], recipe.get("data.fold"), "recipe.data.fold"),
        test=check(of_test, metrics.get(test), f"metrics.{test}"),
        val=check(of_val, metrics.get(val), f"metrics.{val}"),
        options=_options(compression, values),
        recipe=recipe,
        environment=check(dict[str, Any], values.get("environment") or {}, "environment"),
        command=_shorten(str(values.get("command") or "")),
        **found,
    )


def _refuse_unfinished(values: Mapping[str, Any]) -> None:
    status = check(str, values.get("status"), "status")
    if status == "completed":
        return
    compression = values.get("compression")
    asked = compression if isinstance(compression, dict) else {}
    ratio, seed = asked.get("requested_ratio") or asked.get("ratio"), values.get("seed")
    given = [
        f"{name} {value}" for name, value in (("ratio", ratio), ("seed", seed)) if value is not None
    ]
    job = ", ".join([str(asked.get("name", "unknown")), *given])
    raise InputError(f"{status}: {values.get('error', 'no reason is given')} ({job})")


def _options(compression: Mapping[str, object], values: Mapping[str, Any]) -> dict[str, object]:
    options = {key: value for key, value in compression.items() if key not in _NO_OPTIONS}
    distill, ema, given = (values.get(key) for key in ("distill", "ema", "init_from"))
    if isinstance(distill, dict):
        teacher = distill.get("teacher")
        teacher = teacher if isinstance(teacher, dict) else {}
        of_teacher = teacher.get("compression")
        strategy = of_teacher.get("name") if isinstance(of_teacher, dict) else None
        options["distill"] = f"{teacher.get('backbone')} {strategy}"
        for key in ("temperature", "weight"):
            options[f"distill.{key}"] = distill.get(key)
    if isinstance(ema, dict):
        options["ema"] = ema.get("decay")
    if values.get("feedback_samples"):
        options["feedback_samples"] = values["feedback_samples"]
    if isinstance(given, dict):
        options["init_from"] = "/".join(PurePath(str(given.get("source"))).parts[-2:])
        if given.get("layers"):
            options["init_from"] += f" layers {given['layers']}"
    return options


def _shorten(command: str) -> str:
    """Leave what to type again: no folder, and nothing that a sweep adds for its own use."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if before in _OF_HYDRA or word in _OF_HYDRA or word.startswith(_OF_ONE_START):
            continue
        kept.append(PurePath(word).name if word.endswith(".py") else word)
    return shlex.join(kept)


def _read_metrics(path: Path) -> tuple[dict[str, Curve], dict[str, float]]:
    """Read the curves, and the last densities, of a metrics.csv; both empty without one."""
    if not path.exists():
        return {}, {}
    curves: dict[str, dict[int, float]] = {}
    densities: dict[str, float] = {}
    try:
        with open_regular(path, "r", encoding="utf-8", newline="") as file:
            # A longer line is read in parts, which are not complete.
            reader = csv.reader(iter(lambda: file.readline(_LONGEST_LINE), ""))
            names = next(reader, [])
            if "step" not in names:
                raise InputError("no column 'step'")
            for row in reader:
                if len(row) != len(names):
                    raise InputError(f"line {reader.line_num} is not complete")
                _read_row(dict(zip(names, row, strict=True)), curves, densities)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"damaged ({error})") from error
    return {name: _thin(values) for name, values in sorted(curves.items())}, densities


def _read_row(
    row: Mapping[str, str], curves: dict[str, dict[int, float]], densities: dict[str, float]
) -> None:
    """Take what a row says. Where a step comes twice, as after a resume, the later row counts."""
    for name, text in row.items():
        if not text or not name.startswith((*_CURVES, _DENSITY)):
            continue
        value = float(text)
        if not math.isfinite(value):  # no plot has a place for it
            continue
        if name.startswith(_DENSITY):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be at least 0 and at most 1, not {text}")
            densities[name.removeprefix(_DENSITY)] = value
        else:
            step = int(row["step"])
            if not 0 <= step < MAX_STEPS:
                raise InputError(f"no run has {row['step'][:20]} steps")
            curves.setdefault(name, {})[step] = value


def _thin(values: Mapping[int, float]) -> Curve:
    """Keep the first, the last, and evenly many between; six digits, as a plot needs no more."""
    steps = sorted(values)
    last = len(steps) - 1
    kept: Iterable[int] = range(len(steps))
    if len(steps) > MAX_POINTS:
        kept = (round(number * last / (MAX_POINTS - 1)) for number in range(MAX_POINTS))
    chosen = [steps[place] for place in kept]
    return Curve(tuple(chosen), tuple(float(f"{values[step]:.6g}") for step in chosen))
