"""Values of a JSON object, each with the type and the range that it must have."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["SMALLEST_RATIO", "Fields", "UnusableError"]

SMALLEST_RATIO = 1e-9
"""A logarithmic axis has no place for 0."""
_LARGEST = 2**63 - 1  # what is larger is damaged, and overflows a float at some point


class UnusableError(Exception):
    """What is wrong with a file, in one line without its name."""


class Fields:
    """A JSON object whose values are asked for by key.

    The getters raise `UnusableError` where a value is missing or is not what it must be. `null` is
    the same as a missing key. With `or_none`, a missing value is `None`, a wrong one still raises.
    """

    def __init__(self, value: object, name: str = "") -> None:
        """Wrap a value.

        Args:
            value: Anything that JSON can hold.
            name: Where it stands, for messages; empty for a whole file.

        Raises:
            UnusableError: It is no object.
        """
        if not isinstance(value, dict):
            raise UnusableError(f"{name or 'the contents'} must be an object, not {_kind(value)}")
        self.values: Mapping[str, Any] = value
        self._name = name

    def section(self, key: str) -> "Fields":
        """Return the object at `key`."""
        return Fields(self._get(key), self._path(key))

    def text(self, key: str) -> str:
        """Return a string that is not empty, and that a path could be."""
        value = self._get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(key, "a text")
        return value

    def number(self, key: str, low: float, high: float = math.inf) -> float:
        """Return a finite number in [low, high]."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not low <= value <= min(high, _LARGEST):  # false for NaN too
            upper = "finite" if high == math.inf else f"at most {high:g}"
            raise self._wrong(key, f"at least {low:g} and {upper}")
        return float(value)

    def number_or_none(self, key: str, low: float, high: float = math.inf) -> float | None:
        """Return a finite number in [low, high], or `None`."""
        return None if self.values.get(key) is None else self.number(key, low, high)

    def integer(self, key: str, low: int) -> int:
        """Return a whole number of at least `low`."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _LARGEST:
            raise self._wrong(key, f"a whole number of at least {low}")
        return value

    def integer_or_none(self, key: str, low: int) -> int | None:
        """Return a whole number of at least `low`, or `None`."""
        return None if self.values.get(key) is None else self.integer(key, low)

    def _get(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise UnusableError(f"{self._path(key)} is missing")
        return self.values[key]

    def _path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key

    def _wrong(self, key: str, expected: str) -> UnusableError:
        shown = repr(self.values[key])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return UnusableError(f"{self._path(key)} must be {expected}, not {shown}")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
