"""By what a run is judged: its metric, as `result.json` names it, and whether its ratio counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ACCURACY", "Primary", "is_near", "primary_of", "show_number"]


@dataclass(frozen=True, order=True)
class Primary:
    """A metric of the validation split, and its like on the test split."""

    name: str
    """Such as `val/acc`."""
    mode: Literal["max", "min"]
    """Which way is better."""
    unit: str
    """What stands on an axis; of shares in [0, 1] it is `%`."""

    @property
    def short(self) -> str:
        """The name without its split."""
        return self.name.partition("/")[2]

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return "accuracy" if self == ACCURACY else self.unit

    @property
    def test(self) -> str:
        """The name on the test split."""
        return f"test/{self.short}"

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.mode == "max" else -1

    def show(self, value: float | None) -> str:
        """Write a value as a reader expects it."""
        if value is None:
            return "-"
        return f"{100 * value:.2f} %" if self.unit == "%" else show_number(value)

    def tested(self, metrics: Mapping[str, Any]) -> Any:
        """Return what was measured on the test split: of packed values, where there are any."""
        return metrics.get(f"packed/{self.test}", metrics.get(self.test))


ACCURACY = Primary("val/acc", "max", "%")
"""Of every run before there were other tasks."""


def show_number(value: float) -> str:
    """Write a number with four digits, or all before the point of a larger one."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def primary_of(result: Mapping[str, Any]) -> Primary:
    """Return the primary metric of a result; that of classification where it names none."""
    found = result.get("primary")
    if not isinstance(found, Mapping):
        return ACCURACY
    name, mode, unit = (found.get(key) for key in ("name", "mode", "unit"))
    if not (isinstance(name, str) and isinstance(unit, str) and "/" in name):
        return ACCURACY
    return Primary(name, "min" if mode == "min" else "max", unit)


def is_near(ratio: float, asked: float) -> bool:
    """Whether a ratio is what was asked for, to a tenth of it; others are compared with nothing."""
    return abs(ratio - asked) <= 0.1 * asked
