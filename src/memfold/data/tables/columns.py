"""The values of a column: numbers, or texts."""

from collections.abc import Iterable
from decimal import Decimal
from numbers import Real

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EXACT",
    "Column",
    "as_texts",
    "column_of",
    "is_number",
    "numbers_of",
    "stray_text",
    "too_large",
]

Column = NDArray[np.float64] | NDArray[np.object_]
"""Numbers, NaN where one is missing; or texts, `None` where one is missing.

Where whole numbers go beyond `EXACT`, and may name classes, numbers are Python's, and `None`.
"""

EXACT = 2**53
"""Up to here every whole number is a float64 of its own."""


def column_of(values: Iterable[object]) -> Column:
    """Return values as numbers if all are (truth values and decimals, too), else as texts.

    Args:
        values: `None`, NaN or pandas' NA where one is missing.

    Raises:
        TypeError: They cannot be looked at one by one.
    """
    items = [None if _is_missing(value) else value for value in values]
    if not all(item is None or isinstance(item, Real | Decimal | np.bool_) for item in items):
        return np.array([None if item is None else str(item) for item in items], np.object_)
    numbers = [None if item is None else _as_number(item) for item in items]
    is_exact = not any(isinstance(number, int) and abs(number) > EXACT for number in numbers)
    return np.array(numbers, np.float64) if is_exact else np.array(numbers, np.object_)


def is_number(values: Column) -> bool:
    """Tell a column of numbers from one of texts."""
    return values.dtype != np.object_ or not any(isinstance(v, str) for v in values.tolist())


def numbers_of(values: Column) -> NDArray[np.float64]:
    """Return numbers as the nearest float64, NaN where one is missing."""
    return np.asarray(values, np.float64)


def as_texts(values: Column) -> list[str | None]:
    """Return what names a category: the text, or the number as it is written."""
    return [None if _is_missing(value) else _as_written(value) for value in values.tolist()]


def stray_text(values: Column) -> tuple[int, str] | None:
    """Find a text among what are mostly numbers: its row, counted from 1, and what it says."""
    texts = [(row, text) for row, text in enumerate(as_texts(values), 1) if text is not None]
    strays = [(row, text) for row, text in texts if not _is_numeral(text)]
    return strays[0] if 0 < len(strays) < len(texts) / 2 else None


def too_large(values: NDArray[np.float64]) -> int | None:
    """Find a number that float32 does not hold, such as infinity: its row, counted from 1."""
    rows = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
    return int(rows[0]) + 1 if len(rows) else None


def _is_missing(value: object) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas' NA does not say whether it differs from itself
        return True
    except ValueError:  # an array
        return False


def _as_number(value: object) -> int | float:
    if isinstance(value, Decimal):
        is_whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if is_whole else float(value)
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    assert isinstance(value, Real)
    return float(value)


def _as_written(value: object) -> str:
    """Write a number so that no other one is written alike: 3 and 0.25, not 3.0."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
