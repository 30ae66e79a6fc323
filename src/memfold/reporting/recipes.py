"""How the runs of a setting were trained, in the words of the command line."""

import json
from collections.abc import Iterable, Sequence

from memfold.reporting.command_recipe import overrides
from memfold.reporting.records import Run

__all__ = ["recipe", "short_recipe"]

_MOST_VALUES = 5
_SHORT = ("epochs", "steps", "data.train_subset", "data.batch_size", "optimizer", "optimizer.lr")
_SHORT += ("scheduler", "scheduler.warmup_epochs", "experiment")


def recipe(runs: Iterable[Run]) -> dict[str, str]:
    """Return what is known of the training of `runs`, each name with all of its values.

    Of a run whose result does not say it, from before there was a recipe, the overrides of its
    command are what is known: experiments and options that are not their defaults.
    """
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        counts = {"epochs": run.epochs, "steps": run.steps}
        found = {name: value for name, value in counts.items() if value is not None}
        for name, value in {**found, **(run.recipe or overrides(run.command))}.items():
            values.setdefault(name, {})[_show(value)] = None
    return {name: _join(list(texts)) for name, texts in values.items()}


def short_recipe(runs: Iterable[Run]) -> str:
    """Return the part of `recipe` that a reader must know before any number, in one line."""
    found = recipe(runs)
    return ", ".join(f"{name} {found[name]}" for name in _SHORT if name in found)


def _show(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.10g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _join(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    try:
        ordered = sorted(texts, key=lambda text: float(text.replace(",", "")))
    except ValueError:
        ordered = sorted(texts)
    if len(ordered) > _MOST_VALUES:
        ordered = [*ordered[:2], "...", *ordered[-2:]]
    return " | ".join(ordered)
