"""What a method is called: its strategy, and the options that tell its runs apart."""

import json
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace

from memfold.reporting.records import Run

__all__ = ["label_methods"]

_ALWAYS_SHOWN = ("distill",)  # a teacher is no detail, even if all runs of a strategy have one


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


def _label(run: Run, shown: Container[tuple[str, str]]) -> str:
    options = [
        f"{key}={_show(value)}"
        for key, value in sorted(run.options.items())
        if (run.strategy, key) in shown
    ]
    return f"{run.strategy} ({', '.join(options)})" if options else run.strategy


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
