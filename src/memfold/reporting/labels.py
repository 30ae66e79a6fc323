"""What methods and settings are called, so that runs of one name belong on one line."""

import json
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace

from memfold.reporting.records import Run, Setting
from memfold.runs.data_names import name_data, source_of

__all__ = ["label_methods", "label_settings"]

# A teacher is no detail, even if all runs of a strategy have one, an average, or given weights.
_ALWAYS_SHOWN = ("distill", "ema", "feedback_samples", "init_from")


def label_methods(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with their method set.

    A method is the strategy, followed by those of its options in which its runs differ among all
    that are given: `stable_rps (gradient_scale=projection)`. A run that does not know an option,
    because its version of memfold did not have it, differs from none in it.
    """
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.options.items():
            values[run.strategy, key].add(_show(value))
    shown = {pair for pair, found in values.items() if len(found) > 1 or pair[1] in _ALWAYS_SHOWN}
    return [replace(run, method=_label(run, shown)) for run in runs]


def label_settings(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with data and backbones told apart that share a name and are not the same.

    Data of the user are named with what tells them from all others that are compared: `table
    flats.csv, price`. Options of a backbone, and what the data ask of it, are no part of its name;
    `mlp` of other widths is `mlp (1,066,440 bytes)`, after the bytes of its dense model.
    """
    names = name_data([_data(run) for run in runs])
    plain = [
        replace(run, setting=replace(_without_size(run), data=name))
        for run, name in zip(runs, names, strict=True)
    ]
    sizes: dict[Setting, set[int]] = defaultdict(set)
    for run in plain:
        sizes[run.setting].add(run.dense_bytes)
    return [_with_size(run) if len(sizes[run.setting]) > 1 else run for run in plain]


def _data(run: Run) -> tuple[str, dict[str, object]]:
    """Return the kind of its data, and which they are; in older lines the recipe says it."""
    source = dict(run.source) or {"data": run.setting.data, **source_of({"recipe": run.recipe})}
    return str(source.pop("data", run.setting.data)), source


def _with_size(run: Run) -> Run:
    backbone = run.setting.backbone + _size(run)
    return replace(run, setting=replace(run.setting, backbone=backbone))


def _without_size(run: Run) -> Setting:
    """Undo what an earlier report added: other runs are compared now."""
    return replace(run.setting, backbone=run.setting.backbone.removesuffix(_size(run)))


def _size(run: Run) -> str:
    return f" ({run.dense_bytes:,} bytes)"


def _label(run: Run, shown: Container[tuple[str, str]]) -> str:
    options = [
        f"{key}={_show(value)}"
        for key, value in sorted(run.options.items())
        if (run.strategy, key) in shown
    ]
    return f"{run.strategy} ({', '.join(options)})" if options else run.strategy


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
