"""Which way to multiply costs least. (First version: the lead's placeholder; keep the names `Choice` and `choose`.)"""

from typing import Literal

from memfold.strategies.sharing.products.layout import RowLayout

__all__ = ["Choice", "choose"]

Choice = Literal["auto", "weight", "windows", "correlation"]


def choose(layout: RowLayout, batch: int, *, training: bool, device_type: str) -> Choice:
    """Choose for one layer and batch."""
    if device_type != "cpu":
        return "weight"
    return "windows" if layout.num_rows * layout.columns > 1 << 16 else "weight"
