"""Why a choice may be none: nothing was learnt, or the best value is the last of the list."""

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import Any

from memfold.runs.primary import ACCURACY, primary_of
from memfold.studies.choose_plan import PlannedRun

__all__ = ["AT_CHANCE", "AT_EDGE", "doubts"]

AT_CHANCE = "chance level"
AT_EDGE = "edge of the list"
_ERRORS = 3.0
"""Standard errors above chance that are still noise."""
_HARDLY = 0.1
"""Of what the best run of the plan has learnt: less is as good as nothing."""


def doubts(
    chosen: PlannedRun, tried: Sequence[PlannedRun], results: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return what makes a choice doubtful.

    `AT_CHANCE`: of classes, the accuracy p on n validation samples is at most
    c + max(3 sqrt(c (1 - c) / n), (p_best - c) / 10), where c is the accuracy of naming the most
    frequent class and p_best that of the best run of all. `AT_EDGE`: the value is the smallest or
    the largest of several.

    Args:
        chosen: The best run.
        tried: The runs it was chosen from.
        results: Name of a completed run of the plan -> contents of its `result.json`.
    """
    if chosen.name not in results:
        return []
    found, values = [], [run.value for run in tried]
    if _is_at_chance(results[chosen.name], results.values()):
        found.append(AT_CHANCE)
    if len(values) > 1 and chosen.value in (min(values), max(values)):
        found.append(AT_EDGE)
    return found


def _is_at_chance(result: Mapping[str, Any], results: Collection[Mapping[str, Any]]) -> bool:
    chance = result.get("chance")
    if chance is None or primary_of(result) != ACCURACY:  # results of before have no chance
        return False
    accuracy = result["metrics"][ACCURACY.name]
    top = max(other["metrics"].get(ACCURACY.name, 0.0) for other in results)
    noise = _ERRORS * sqrt(chance * (1 - chance) / result["samples"]["val"])
    return accuracy <= chance + max(noise, _HARDLY * (top - chance))
