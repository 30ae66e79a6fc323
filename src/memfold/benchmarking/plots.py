"""The pictures of a results.json; the same file gives the same pictures."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memfold.benchmarking.results import Entry, by_group

__all__ = ["draw"]

# Okabe and Ito (2008): told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# One more than colours divide: a colour used twice comes with another marker.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RATIO_FIGURES = (
    ("step_time", "step_seconds", "time of a training step"),
    ("latency_batch_1", "latency_1_seconds", "inference latency, batch 1"),
    ("latency_large_batch", "latency_batch_seconds", "inference latency, large batch"),
)
_PARTS = (
    ("parameters", "parameter_bytes"),
    ("gradients", "gradient_bytes"),
    ("optimizer", "optimizer_bytes"),
    ("saved for backward", "saved_bytes"),
)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "memfold",
    "svg.fonttype": "none",
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw time and memory relative to dense, each as PNG and SVG.

    Args:
        results: What a results.json holds.
        folder: An existing folder.

    Returns:
        The files written. None for a picture that the results have nothing for.
    """
    with mpl.rc_context(_STYLE):
        files = []
        for name, metric, title in _RATIO_FIGURES:
            figure = _ratio_lines(results, metric, title)
            files += _save(figure, folder / name) if figure is not None else []
        figure = _memory_bars(results)
        return files + (_save(figure, folder / "memory") if figure is not None else [])


def _ratio_lines(results: dict[str, Any], metric: str, title: str) -> Figure | None:
    """Draw a metric relative to dense over the ratio: a panel a group, a line a variant."""
    panels = []
    for group, entries in by_group(results):
        shown = [e for e in entries if metric in e["relative"] and e["case"]["ratio"] is not None]
        if shown:
            panels.append((group, shown))
    if not panels:
        return None
    variants = list(dict.fromkeys(e["variant"] for _, shown in panels for e in shown))
    figure, grid = _panels(len(panels), num_columns=3, height=2.8)
    for axes, (group, shown) in zip(grid, panels, strict=True):
        axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
        for number, variant in enumerate(variants):
            of_variant = [entry for entry in shown if entry["variant"] == variant]
            if of_variant:
                _line(axes, number, of_variant, metric)
        axes.set_xscale("log")
        ratios = sorted({entry["case"]["ratio"] for entry in shown})
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_ylim(0, max(1.2, 1.1 * max(e["relative"][metric]["max"] for e in shown)))
        axes.grid(axis="y", alpha=0.2)
        axes.set_title(_short(group, results), fontsize=9)
        axes.set_xlabel("ratio")
    grid[0].set_ylabel("relative to dense")
    handles = {}
    for axes in grid:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    # About 13 characters to the inch, and 8 for the line beside each label.
    longest = max(map(len, handles)) + 8
    columns = max(1, min(3, int(13 * figure.get_figwidth() / longest)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    figure.suptitle(f"{title[0].upper()}{title[1:]} relative to dense (dashed)")
    return figure


def _line(axes: Axes, number: int, entries: Sequence[Entry], metric: str) -> None:
    entries = sorted(entries, key=lambda entry: entry["case"]["ratio"])
    relative = [entry["relative"][metric] for entry in entries]
    medians = [values["median"] for values in relative]
    axes.errorbar(
        [entry["case"]["ratio"] for entry in entries],
        medians,
        yerr=[
            [values["median"] - values["min"] for values in relative],
            [values["max"] - values["median"] for values in relative],
        ],
        color=_COLOURS[number % len(_COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        linewidth=1.2,
        capsize=2,
        label=entries[0]["variant"],
    )


def _memory_bars(results: dict[str, Any]) -> Figure | None:
    """Draw the parts of the memory as stacked bars: a panel a group, the dense sum is 1."""
    panels = []
    for group, entries in by_group(results):
        shown = [entry for entry in entries if "peak_bytes" in entry["relative"]]
        if shown and shown[0]["case"]["strategy"] == "dense":
            panels.append((group, shown))
    if not panels:
        return None
    rows = max(len(shown) for _, shown in panels)
    figure, grid = _panels(len(panels), num_columns=2, height=0.9 + 0.3 * rows)
    for axes, (group, shown) in zip(grid, panels, strict=True):
        _stack(axes, shown)
        axes.set_title(_short(group, results), fontsize=9)
        axes.set_xlabel("relative to dense")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle("Memory of a training step: parts relative to the dense sum, peak to its peak")
    return figure


def _stack(axes: Axes, entries: Sequence[Entry]) -> None:
    dense = sum(entries[0]["measured"][metric]["median"] for _, metric in _PARTS)
    places = list(range(len(entries)))
    left = [0.0] * len(entries)
    for (name, metric), colour in zip(_PARTS, _COLOURS[: len(_PARTS)], strict=True):
        widths = [entry["measured"][metric]["median"] / dense for entry in entries]
        axes.barh(places, widths, left=left, height=0.6, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    peaks = [entry["relative"]["peak_bytes"]["median"] for entry in entries]
    axes.plot(peaks, places, "k|", markersize=14, markeredgewidth=2, label="peak")
    axes.set_yticks(places, [entry["name"] for entry in entries], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)


def _panels(number: int, num_columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure with this many panels, `height` inches each."""
    columns = min(number, num_columns)
    rows = ceil(number / columns)
    width = 3.6 if num_columns == 3 else 5.5
    figure = Figure(figsize=(max(7.0, width * columns), height * rows + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(number)]


def _short(group: str, results: dict[str, Any]) -> str:
    """Name a group by its model, and by what other groups of the same model do not share."""
    parts = [name.split(", ") for name, _ in by_group(results)]
    words = group.split(", ")
    others = [other for other in parts if other[0] == words[0]]
    varied = [word for place, word in enumerate(words) if any(o[place] != word for o in others)]
    return ", ".join([words[0], *varied])


def _save(figure: Figure, stem: Path) -> list[Path]:
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(files[0], dpi=150)
    # Without a date, the same results give the same bytes.
    figure.savefig(files[1], metadata={"Date": None})
    return files
