"""What all figures have in common: their looks, their axes and their legends."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from memfold.reporting.metrics import axis_title, is_share
from memfold.reporting.records import Setting
from memfold.runs.primary import Primary

__all__ = [
    "FRONT",
    "GREY",
    "add_legend",
    "house_style",
    "new_figure",
    "set_bytes_axis",
    "set_metric_axis",
    "set_ratio_axis",
    "title_of",
    "wrap",
]

GREY = "0.35"
FRONT = "Pareto front"
"""The label of its rings: last in every legend."""
_WIDTH = 8.4  # inches; at 150 dots an inch, twice what a README shows
_CHARACTERS = 118  # of a legend, to a line of this width
_LONGEST_LINE = 44  # characters of a method's name
_HANDLE = 9  # characters that a legend's line and gaps take


def house_style() -> AbstractContextManager[None]:
    """Return the settings that every figure is drawn and saved under."""
    settings = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "pdf.fonttype": 42,  # Type 3 fonts are what some journals refuse
        "text.parse_math": False,  # names are the runs' own and may hold a dollar
    }
    return mpl.rc_context(settings)  # type: ignore[arg-type]


def new_figure(
    num_panels: int, height: float, title: str, *, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels side by side, or one above the other.

    Args:
        num_panels: How many.
        height: Of the figure without a legend, in inches.
        title: Above all panels.
        stacked: Whether the panels stand one above the other.
    """
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=10.5)
    grid = (num_panels, 1) if stacked else (1, num_panels)
    panels = [figure.add_subplot(*grid, number + 1) for number in range(num_panels)]
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, panels


def add_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """List every label once, below the panels, and make the figure higher by as much."""
    handles = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    if not handles:
        return
    labels = sorted(handles, key=lambda label: (label == FRONT, label != "dense", label))
    columns = _num_columns(labels)
    width, height = figure.get_size_inches()
    num_lines = sum(wrap(label).count("\n") + 1 for label in labels)
    figure.set_size_inches(width, height + 0.2 + 0.18 * math.ceil(num_lines / columns))
    figure.legend(
        [handles[label] for label in labels],
        list(map(wrap, labels)),
        loc="outside lower center",
        ncols=columns,
        fontsize=8.5,
        frameon=False,
        handlelength=3.2,
        columnspacing=1.4,
    )


def _num_columns(labels: Sequence[str]) -> int:
    """Return how many columns of a legend fit; each is filled before the next."""
    for number in range(min(6, len(labels)), 1, -1):
        rows = math.ceil(len(labels) / number)
        columns = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        widths = [max(min(len(label), _LONGEST_LINE) for label in column) for column in columns]
        if sum(widths) + _HANDLE * len(widths) <= _CHARACTERS:
            return number
    return 1


def wrap(label: str) -> str:
    """Break the name of a method that has many options."""
    return textwrap.fill(label, _LONGEST_LINE)


def set_metric_axis(axes: Axes, primary: Primary) -> None:
    """Name the test split's metric, and show shares as percent."""
    if is_share(primary):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    axes.set_ylabel(axis_title(primary))


def set_bytes_axis(axes: Axes, *, is_log: bool) -> None:
    """Label the x axis in kB and MB, on a log axis also between the powers of ten."""
    if is_log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        steps = (1.0, 2.0, 5.0) if high / low < 2000 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))


def set_ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    """Put a tick at each ratio, as long as there are some and room for all of them."""
    axes.set_xscale("log")
    if 0 < len(ratios) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(list(ratios)))
    else:
        low, high = axes.get_xlim()
        steps = (1.0, 2.0, 5.0) if high / low > 10 else range(1, 10)
        axes.xaxis.set_major_locator(LogLocator(subs=list(steps)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_minor_locator(NullLocator())


def title_of(setting: Setting) -> str:
    """Name a setting as a reader would."""
    return f"{setting.data}, {setting.backbone.rpartition('.')[2]}"
