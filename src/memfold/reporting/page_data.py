"""The numbers of the page, as plain objects for JSON: nothing is left for it to average."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from memfold.reporting.metrics import axis_title, is_share, name_of
from memfold.reporting.recipes import recipe, short_recipe
from memfold.reporting.records import Comparison, Curve, Reference, Run, Setting
from memfold.reporting.statistics import (
    AXES,
    NEGLIGIBLE_COST,
    TIE_ERRORS,
    Point,
    WinMatrix,
    at_best_bits,
    at_most_bits,
    best,
    common_request,
    has_collapsed,
    mean_curve,
    near,
    num_trainings,
    points,
    win_matrix,
)
from memfold.reporting.styles import Style, comparison_styles
from memfold.reporting.unlike_runs import natural

__all__ = ["BEST_BITS", "page_data"]

BEST_BITS = "best"
_MOST = 0.75
_COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "stored_bytes": lambda run: run.stored_bytes,
    "stored_ratio": lambda run: run.stored_ratio,
    "train_state_bytes": lambda run: run.train_state_bytes,
    "peak_bytes": lambda run: run.peak_bytes,
    "step_seconds": lambda run: run.step_seconds,
    "trainings": lambda run: run.rounds,
    "fit_seconds": lambda run: run.fit_seconds,
}


def page_data(comparison: Comparison) -> dict[str, object]:
    """Return all that the page shows; numbers that are not finite become `None`."""
    by_setting: dict[Setting, list[Run]] = {}
    for run in comparison.runs:
        by_setting.setdefault(run.setting, []).append(run)
    looks = comparison_styles(comparison)
    data = {
        "axes": [
            {"key": axis.key, "title": axis.title, "isLog": axis.is_log} for axis in AXES.values()
        ],
        "tieErrors": TIE_ERRORS,
        "negligibleCost": NEGLIGIBLE_COST,
        "settings": [
            _setting(setting, runs, comparison.references, looks)
            for setting, runs in sorted(by_setting.items(), key=_largest_first)
        ],
        "problems": [{"folder": p.folder, "reason": p.reason} for p in comparison.problems],
        "environments": _environments(comparison.runs),
        "commands": sorted(
            {(run.folder, run.command) for run in comparison.runs},
            key=lambda command: [natural(part) for part in command],
        ),
    }
    return _finite(data)  # type: ignore[return-value]


def _largest_first(item: tuple[Setting, list[Run]]) -> tuple[int, Setting]:
    setting, runs = item
    return -len(runs), setting


def _setting(
    setting: Setting, runs: list[Run], references: Sequence[Reference], looks: Mapping[str, Style]
) -> dict[str, object]:
    numbers = {id(run): number for number, run in enumerate(runs)}
    rows = points(runs, AXES["stored_bytes"])
    at_ratios = sorted(
        points(at_most_bits(runs), AXES["stored_bytes"]), key=lambda point: (point.method, point.x)
    )
    common = common_request(runs)
    widest = max(point.bits for point in rows)
    return {
        "parts": setting.parts,
        "metric": {
            "name": setting.primary.name,
            "short": setting.primary.short,
            "title": name_of(setting.primary),
            "axis": axis_title(setting.primary),
            "unit": setting.primary.unit,
            "isShare": is_share(setting.primary),
            "sign": setting.primary.sign,
            "near": near(rows),
        },
        "numRuns": num_trainings(runs),
        "training": short_recipe(runs),
        "recipe": list(recipe(runs).items()),
        "opensAt": next((p.runs[0].asked for p in rows if p.runs[0].request == common), None),
        "opensNear": _is_crowded([point for point in rows if point.bits == widest]),
        "methods": _methods(runs, looks),
        "bits": sorted({run.bits for run in runs}, reverse=True),
        "runs": [_run(run) for run in runs],
        "planes": {axis.key: _planes(points(runs, axis), numbers) for axis in AXES.values()},
        "rows": [_row(point, numbers) for point in rows],
        "curves": [curve for point in at_ratios for curve in _curves(point)],
        "densities": [_densities(p) for p in at_ratios if any(r.densities for r in p.runs)],
        "wins": [_wins(matrix) for matrix in win_matrix(runs)],
        "references": _references([r for r in references if r.setting == setting], looks),
    }


def _is_crowded(found: Sequence[Point]) -> bool:
    """Tell whether most points stand close together only because a few others have collapsed."""
    worst_near = best(found).quality - near(found)
    num_near = sum(point.quality >= worst_near for point in found)
    return has_collapsed(found) and num_near >= _MOST * len(found)


def _methods(runs: Iterable[Run], looks: Mapping[str, Style]) -> list[dict[str, object]]:
    """List the methods, dense first: every other one is read against it."""
    examples = {run.method: run for run in runs}
    return [
        {
            "name": method,
            "isDense": examples[method].is_dense,
            "isOfSetting": examples[method].network is None,
            "colour": looks[method].colour,
            "dash": looks[method].dash,
            "symbol": looks[method].symbol,
        }
        for method in sorted(examples, key=lambda m: (not examples[m].is_dense, m))
    ]


def _run(run: Run) -> dict[str, object]:
    return {
        "folder": run.folder,
        "seed": run.seed,
        "fold": run.fold,
        "ratio": run.ratio,
        "bits": run.bits,
        "y": run.test,
        "epochs": run.epochs,
        "x": {key: axis.value(run) for key, axis in AXES.items()},
    }


def _planes(found: list[Point], numbers: Mapping[int, int]) -> dict[str, object]:
    """Return the points at each number of bits, and at the best of all of each method."""
    chosen = {str(bits): [p for p in found if p.bits == bits] for bits in {p.bits for p in found}}
    chosen[BEST_BITS] = at_best_bits(found)
    return {bits: [_point(point, numbers) for point in group] for bits, group in chosen.items()}


def _point(point: Point, numbers: Mapping[int, int]) -> dict[str, object]:
    return {
        "method": point.method,
        "bits": point.bits,
        "ratio": point.runs[0].asked,
        "x": point.x,
        "xStd": point.x_std,
        "y": point.y,
        "yStd": point.y_std,
        "yHalf": point.y_half,
        "runs": [numbers[id(run)] for run in point.runs],
    }


def _row(point: Point, numbers: Mapping[int, int]) -> dict[str, object]:
    columns = {key: _mean(map(value, point.runs)) for key, value in _COLUMNS.items()}
    order = fmean(run.ratio for run in point.runs)
    asked = point.requested_ratio
    return _point(point, numbers) | columns | {"order": order if asked is None else asked}


def _curves(point: Point) -> list[dict[str, object]]:
    metrics = sorted({metric for run in point.runs for metric in run.curves})
    curves = []
    for metric in metrics:
        mean = mean_curve(point.runs, metric) or Curve((), ())
        curves.append(
            {
                "method": point.method,
                "ratio": point.runs[0].asked,
                "metric": metric,
                "seeds": sum(metric in run.curves for run in point.runs),
                "steps": mean.steps,
                "values": [
                    None if math.isnan(value) else float(f"{value:.5g}") for value in mean.values
                ],
            }
        )
    return curves


def _densities(point: Point) -> dict[str, object]:
    runs = [run.densities for run in point.runs if run.densities]
    tensors = list(dict.fromkeys(tensor for densities in runs for tensor in densities))
    return {
        "method": point.method,
        "ratio": point.runs[0].asked,
        "seeds": len(runs),
        "tensors": tensors,
        "values": [_mean(densities.get(tensor) for densities in runs) for tensor in tensors],
    }


def _wins(matrix: WinMatrix) -> dict[str, object]:
    return {
        "bits": matrix.bits,
        "methods": matrix.methods,
        "cells": [
            {
                "asked": cell.points[0].runs[0].asked,
                "winners": cell.winners,
                "isOneSeed": cell.is_one_seed,
                "separated": cell.separated,
                "points": [
                    {"method": p.method, "y": p.y, "yStd": p.y_std, "seeds": len(p.runs)}
                    for p in cell.points
                ],
            }
            for cell in matrix.cells
        ],
        "duels": [
            {"one": one, "other": other, "wins": d.wins, "ties": d.ties, "losses": d.losses}
            for (one, other), d in matrix.duels.items()
        ],
    }


def _references(references: Iterable[Reference], looks: Mapping[str, Style]) -> list[object]:
    """Return one curve for each published method; all that is published of it is over the ratio."""
    by_method: dict[str, list[Reference]] = {}
    for reference in references:
        by_method.setdefault(reference.method, []).append(reference)
    return [
        {
            "name": method,
            "colour": looks[method].colour,
            "symbol": looks[method].symbol,
            "x": [reference.ratio for reference in sorted(group, key=lambda r: r.ratio)],
            "y": [reference.accuracy for reference in sorted(group, key=lambda r: r.ratio)],
        }
        for method, group in sorted(by_method.items())
    ]


def _environments(runs: Iterable[Run]) -> list[dict[str, object]]:
    """Return, for each name of the environment, its values with the number of their runs."""
    counts: dict[str, Counter[str]] = {}
    for environment in {run.folder: run.environment for run in runs}.values():
        for name, value in environment.items():
            if name == "git_dirty":
                continue
            text = "unknown" if value is None else str(value)
            if name == "git_commit" and environment.get("git_dirty"):
                text += " with uncommitted changes"
            counts.setdefault(name, Counter())[text] += 1
    return [
        {"name": name, "values": [{"text": t, "runs": n} for t, n in counter.most_common()]}
        for name, counter in sorted(counts.items())
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _finite(value: object) -> object:
    """Replace what JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
