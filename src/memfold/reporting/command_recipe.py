"""What the commands of runs say of their training, where the results do not."""

import shlex
from collections.abc import Iterable, Sequence

from memfold.reporting.records import Run

__all__ = ["differences", "overrides"]

_UNSET = "its default"
# Known from the results, or of no effect on them.
_LEFT_OUT = {"backbone", "budget_bytes", "data", "data.download", "data.fold", "data.root", "ratio"}
_LEFT_OUT |= {"resume", "seed", "trainer"}
_GROUPS_LEFT_OUT = {"artifact", "callbacks", "checkpoint", "compression", "distill", "extras"}
_GROUPS_LEFT_OUT |= {"hydra", "logger", "sweep"}


def differences(runs: Sequence[Run]) -> list[tuple[str, dict[str, Run]]]:
    """Return the overrides, such as that of `optimizer.lr`, in which runs differ.

    Args:
        runs: Of one method, with the same request. Those without a command differ from none.

    Returns:
        The name of each override, and its values, each with the first run that has it.
    """
    known = [(run, overrides(run.command)) for run in runs if run.command]
    found = []
    for name in sorted({name for _, given in known for name in given}):
        values: dict[str, Run] = {}
        for run, given in known:
            values.setdefault(given.get(name, _UNSET), run)
        if len(values) > 1:
            found.append((name, values))
    return found


def overrides(command: str) -> dict[str, str]:
    """Return the overrides of a command that say how its run was trained, with their values."""
    pairs = (word.partition("=") for word in _words(command))
    named = ((name.lstrip("+~"), value) for name, _, value in pairs)
    return {name: value for name, value in named if name and not _is_left_out(name)}


def _is_left_out(name: str) -> bool:
    return name in _LEFT_OUT or name.partition(".")[0] in _GROUPS_LEFT_OUT


def _words(command: str) -> Iterable[str]:
    try:
        return [word for word in shlex.split(command) if "=" in word and not word.startswith("-")]
    except ValueError:
        return []
