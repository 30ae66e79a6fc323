"""How the primary metric of a setting is called and written: the same in every table and picture.

Shares are percent. All others have four significant digits, and their spread as many decimals.
"""

import math

from memfold.runs.primary import ACCURACY, Primary

__all__ = ["axis_title", "columns", "factor", "is_share", "name_of", "unit_mark", "write"]


def is_share(primary: Primary) -> bool:
    """Return whether its values are shares in [0, 1], shown as percent."""
    return primary.unit == "%"


def name_of(primary: Primary) -> str:
    """Return what a reader calls it: accuracy, bits per byte, RMSE."""
    return primary.short if is_share(primary) and primary != ACCURACY else primary.title


def axis_title(primary: Primary, split: str = "test") -> str:
    """Return its name with the unit, and the way that is better where it is not up."""
    unit = ", %" if is_share(primary) else ""
    way = " (lower is better)" if primary.mode == "min" else ""
    return f"{split} {name_of(primary)}{unit}{way}"


def columns(primary: Primary) -> tuple[str, str]:
    """Return the names under which its test and validation values stand in files."""
    if primary == ACCURACY:
        return "accuracy", "val_accuracy"
    return primary.test, primary.name


def factor(primary: Primary) -> int:
    """Return what a value is multiplied with to be shown."""
    return 100 if is_share(primary) else 1


def unit_mark(primary: Primary) -> str:
    """Return what follows a value that stands beside the metric's name."""
    return " %" if is_share(primary) else ""


def write(value: float, primary: Primary, *, digits: int = 2, mean: float | None = None) -> str:
    """Write a value without its unit.

    Args:
        value: Of the metric, or its spread.
        primary: The metric.
        digits: After the point of a percentage.
        mean: What the spread is that of.
    """
    if not is_share(primary):
        digits = _decimals(value if mean is None else mean)
    separator = "," if abs(value) >= 1e4 else ""  # as at the end of a run
    return f"{factor(primary) * value:{separator}.{digits}f}"


def _decimals(value: float) -> int:
    return max(0, 3 - math.floor(math.log10(abs(value)))) if value else 3
