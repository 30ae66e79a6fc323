"""Published curves, from a CSV of `method,dataset,model,ratio,accuracy`."""

import csv
from collections.abc import Collection, Iterable
from pathlib import Path

from memfold.errors import InputError
from memfold.files import open_regular
from memfold.reporting.records import SMALLEST_RATIO, Problem, Reference, Setting

__all__ = ["read_references"]

_COLUMNS = ("method", "dataset", "model", "ratio", "accuracy")


def read_references(
    files: Iterable[Path], settings: Collection[Setting]
) -> tuple[list[Reference], list[Problem]]:
    """Read the points of published curves.

    Args:
        files: CSV files; further columns are ignored.
        settings: Those of the runs; a dataset and a model that no run has are a problem.

    Raises:
        InputError: A file cannot be read, or a value is missing or out of range.
    """
    references: dict[object, Reference] = {}
    problems: list[Problem] = []
    for file in files:
        found = _read(file)
        if not found:
            problems.append(Problem(file.name, "holds no published accuracy"))
        for reference in found:
            key = (reference.setting, reference.method, reference.ratio)
            if reference.setting not in settings:
                reason = _describe_unknown(reference.setting, settings)
                problems.append(Problem(file.name, reason))
            elif references.setdefault(key, reference) != reference:
                reason = _describe_repeated(references[key], reference)
                problems.append(Problem(file.name, reason))
    return list(references.values()), list(dict.fromkeys(problems))


def _describe_unknown(setting: Setting, settings: Collection[Setting]) -> str:
    known = "; ".join(", ".join(known.parts) for known in sorted(settings))
    return (
        f"published curves for dataset {setting.data}, model {setting.backbone} are not drawn: "
        f"the runs are of {known or 'none'}"
    )


def _describe_repeated(kept: Reference, other: Reference) -> str:
    return (
        f"{other.method} at ratio {other.ratio:g} of {', '.join(kept.setting.parts)} is "
        f"published twice, as {kept.accuracy:g} and {other.accuracy:g}: the first is drawn"
    )


def _read(file: Path) -> list[Reference]:
    try:
        with open_regular(file, "r", encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{file}: the columns must be {','.join(_COLUMNS)}; missing: "
                    + ", ".join(missing)
                )
            return [_parse(row, f"{file} line {reader.line_num}") for row in reader]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is no CSV file ({error})") from error


def _parse(row: dict[str, str | None], place: str) -> Reference:
    texts = {name: (row[name] or "").strip() for name in _COLUMNS}
    empty = [name for name, text in texts.items() if not text]
    if empty:
        raise InputError(f"{place}: no value for {', '.join(empty)}")
    return Reference(
        Setting(texts["dataset"], texts["model"]),
        texts["method"],
        _number(texts, "ratio", SMALLEST_RATIO, place),
        _number(texts, "accuracy", 0.0, place),
    )


def _number(texts: dict[str, str], key: str, low: float, place: str) -> float:
    try:
        value = float(texts[key])
    except ValueError:
        value = float("nan")
    if not low <= value <= 1:
        hint = ", a share and not percent" if key == "accuracy" else ""
        raise InputError(
            f"{place}: {key} must be a number from {low:g} to 1{hint}; got {texts[key]}"
        )
    return value
