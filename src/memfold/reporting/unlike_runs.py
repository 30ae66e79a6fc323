"""What would be averaged or compared, but should not be without a word."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from memfold.reporting.command_recipe import differences
from memfold.reporting.metrics import name_of
from memfold.reporting.records import Problem, Run, Setting

__all__ = ["keep_first", "natural", "sort_problems", "warn_of_unequal_training"]


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts job 2 before job 10."""
    parts = re.split(r"(\d+)", text)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def sort_problems(problems: Iterable[Problem]) -> list[Problem]:
    """List each problem once, by folder."""
    return sorted(set(problems), key=lambda p: (natural(p.folder), natural(p.reason)))


def keep_first(runs: Iterable[Run]) -> tuple[list[Run], list[Problem]]:
    """Leave out runs that differ from an earlier one in nothing, neither seed nor fold.

    Returns:
        The runs that are kept, and a problem for each folder that is not.
    """
    first: dict[object, Run] = {}
    problems: dict[str, Problem] = {}
    for run in runs:
        key = (run.setting, run.method, run.request, run.bits, run.seed, run.fold)
        other = first.setdefault(key, run)
        if other is run or run.folder in problems or _is_the_same_dense_model(other, run):
            continue
        problems[run.folder] = Problem(
            run.folder, f"{_compare(other, run)} ({_describe(run)}, seed {run.seed}); left out"
        )
    return list(first.values()), list(problems.values())


def warn_of_unequal_training(runs: Iterable[Run]) -> list[Problem]:
    """Name the points whose runs were trained differently, and settings whose data differ.

    A training set of another size, and another batch size, show in the steps of an epoch.
    """
    points: dict[object, list[Run]] = defaultdict(list)
    settings: dict[Setting, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        points[run.setting, run.method, run.request].append(run)
        if run.steps and run.epochs:
            settings[run.setting].setdefault(round(run.steps / run.epochs), run)
    problems = []
    for group in points.values():
        for name, values in (
            ("epochs", {run.epochs for run in group}),
            ("steps", {run.steps for run in group}),
        ):
            known = sorted(value for value in values if value is not None)
            if len(known) > 1:
                listed = ", ".join(f"{value:g}" for value in known)
                problems.append(
                    Problem(
                        _place(group[0].setting),
                        f"averaged seeds of {_describe(group[0])} differ in {name}: {listed}",
                    )
                )
                break
        problems += [
            Problem(
                _place(group[0].setting),
                f"averaged seeds of {_describe(group[0])} differ in {name}: {_list(values)}",
            )
            for name, values in differences(group)
        ]
    for setting, examples in settings.items():
        if len(examples) > 1:
            problems.append(
                Problem(
                    _place(setting),
                    "runs differ in the optimizer steps of an epoch, so in training data or batch "
                    f"size: {_list(dict(sorted(examples.items())))}",
                )
            )
    return problems


def _is_the_same_dense_model(one: Run, other: Run) -> bool:
    """Tell whether a sweep over ratios has trained the dense model, which has none, once more."""
    return (
        one.is_dense
        and (one.test, one.stored_bytes) == (other.test, other.stored_bytes)
        and one.command != other.command
        and not differences((one, other))
    )


def _compare(kept: Run, other: Run) -> str:
    if (kept.test, kept.stored_bytes) == (other.test, other.stored_bytes):
        return f"repeats {kept.folder}, with the same result"
    primary = kept.setting.primary
    told = [
        f"test {name_of(primary)} {other.test:.4f} where that has {kept.test:.4f}",
        *(
            f"{name} {second} where that has {first}"
            for name, (first, second) in differences((kept, other))
        ),
    ]
    return f"repeats {kept.folder}, with {' and '.join(told)}"


def _list(examples: Mapping[Any, Run]) -> str:
    return ", ".join(f"{value} in {run.folder}" for value, run in examples.items())


def _describe(run: Run) -> str:
    kind, value = run.request
    if run.is_dense:
        return run.method
    return (
        f"{run.method}, {value:,.0f} bytes" if kind == "budget_bytes" else f"{run.method} {value:g}"
    )


def _place(setting: Setting) -> str:
    return ", ".join(setting.parts)
