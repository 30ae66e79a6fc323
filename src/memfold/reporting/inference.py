"""What a few seeds say about means: Student's intervals, paired tests, Holm's correction."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

from scipy.special import stdtr, stdtrit

__all__ = ["CONFIDENCE", "half_width", "holm", "paired_p_value"]

_K = TypeVar("_K")
CONFIDENCE = 0.95
_ROUNDING = 1e-9  # relative, of values that were computed in another order


def half_width(std: float | None, count: int) -> float | None:
    """Return t s / sqrt(n), half of Student's interval of a mean at level `CONFIDENCE`.

    Args:
        std: Sample standard deviation s; `None` where n is 1, as is the result.
        count: n.
    """
    if std is None:
        return None
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(count)


def paired_p_value(one: Mapping[_K, float], other: Mapping[_K, float]) -> float | None:
    """Return the two-sided p-value of Student's paired test that two means are equal.

    Args:
        one: What is paired, such as a seed -> a value.
        other: The same; what only one of them has is left out.

    Returns:
        `None` with fewer than two pairs, or when all differences are the same: without a spread
        there is nothing to measure them by.
    """
    differences = [one[key] - other[key] for key in one.keys() & other.keys()]
    size = max(map(abs, [*one.values(), *other.values()]), default=0.0)
    if len(differences) < 2 or (std := statistics.stdev(differences)) <= _ROUNDING * size:
        return None
    t = statistics.fmean(differences) / (std / math.sqrt(len(differences)))
    return float(2 * stdtr(len(differences) - 1, -abs(t)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values of one family, so that comparing each with a level keeps it for all together.

    The i-th smallest of k becomes max over j <= i of min(1, (k - j + 1) p_j) (Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979).

    Args:
        p_values: `None` where there was no test, which stays so and does not count.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = largest
    return adjusted
