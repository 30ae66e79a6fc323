"""Memory bars, training curves and densities of all methods, at one ratio."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from memfold.reporting.drawing import GREY, add_legend, new_figure, set_bytes_axis, title_of, wrap
from memfold.reporting.metrics import axis_title, is_share, name_of, unit_mark, write
from memfold.reporting.records import Run
from memfold.reporting.statistics import common_request, mean_curve
from memfold.reporting.styles import Style

__all__ = ["draw_curves", "draw_densities", "draw_memory"]

_MEMORY: tuple[tuple[str, Callable[[Run], int | None]], ...] = (
    ("parameters, gradients, optimizer state", lambda run: run.train_state_bytes),
    ("peak of training", lambda run: run.peak_bytes),
)
Request = tuple[str, float]
_MAX_NAMES = 24
_LONGEST_NAME = 26


def draw_memory(
    runs: Sequence[Run], request: Request | None, styles: Mapping[str, Style]
) -> Figure | None:
    """Draw the bytes of the train state and the peak, with the test metric beside each bar.

    Args:
        runs: Of one setting, each training once.
        request: What was asked of those that are shown; dense is shown in any case.
        styles: Of every method.

    Returns:
        `None` where neither was measured.
    """
    methods, note = _at_request(runs, request)
    panels = [
        (title, found)
        for title, value in _MEMORY
        if (found := {method: _mean(group, value) for method, group in methods.items()})
        and any(number is not None for number in found.values())
    ]
    if not panels:
        return None
    setting = runs[0].setting
    primary = setting.primary
    title = f"{title_of(setting)}: memory of training, with test {name_of(primary)}{note}"
    num_lines = sum(wrap(method).count("\n") + 1 for method in methods)
    figure, grid = new_figure(len(panels), 1.3 + 0.25 * num_lines, title)
    for axes, (name, values) in zip(grid, panels, strict=True):
        for place, method in enumerate(methods):
            width = values[method]
            if width is not None:
                axes.barh(place, width, height=0.66, color=styles[method].colour, alpha=0.8)
                mean = fmean(run.test for run in methods[method])
                axes.annotate(
                    write(mean, primary, digits=1) + unit_mark(primary),
                    (width, place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.set_yticks(range(len(methods)), list(map(wrap, methods)) if axes is grid[0] else [])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(name)
        axes.grid(visible=False, axis="y")
        set_bytes_axis(axes, is_log=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def draw_curves(
    runs: Sequence[Run], request: Request | None, styles: Mapping[str, Style]
) -> Figure | None:
    """Draw the validation metric and the training loss over the optimizer steps, means over seeds.

    Args:
        runs: Of one setting, each training once.
        request: What was asked of those that are shown; dense is shown in any case.
        styles: Of every method.

    Returns:
        `None` where no run has curves.
    """
    methods, note = _at_request(runs, request)
    primary = runs[0].setting.primary
    panels = [
        (name, heading, found)
        for name, heading in (
            (primary.name, axis_title(primary, "validation")),
            ("train/loss", "training loss"),
        )
        if (found := {m: c for m, group in methods.items() if (c := mean_curve(group, name))})
    ]
    if not panels:
        return None
    title = f"{title_of(runs[0].setting)}: training curves, means over seeds{note}"
    figure, grid = new_figure(len(panels), 3.6, title)
    for axes, (name, heading, curves) in zip(grid, panels, strict=True):
        for method, curve in curves.items():
            _draw_marked(axes, curve.steps, curve.values, method, styles[method])
        axes.set_title(heading)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if name == primary.name and is_share(primary):
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    add_legend(figure, grid)
    return figure


def draw_densities(
    runs: Sequence[Run], request: Request | None, styles: Mapping[str, Style]
) -> Figure | None:
    """Draw the share of weights that each sparse method keeps in each tensor.

    Args:
        runs: Of one setting, each training once.
        request: What was asked of those that are shown; dense is shown in any case.
        styles: Of every method.

    Returns:
        `None` where no run is sparse.
    """
    sparse = [run for run in runs if run.densities]
    if not any(run.request == request for run in sparse):
        request = common_request(sparse)
    methods, note = _at_request(sparse, request)
    if not methods:
        return None
    tensors = list(
        dict.fromkeys(t for group in methods.values() for r in group for t in r.densities)
    )
    title = f"{title_of(runs[0].setting)}: share of weights kept in each tensor{note}"
    figure, (axes,) = new_figure(1, 4.2, title)
    for method, group in methods.items():
        kept: dict[int, list[float]] = defaultdict(list)
        for run in group:
            for tensor, density in run.densities.items():
                kept[tensors.index(tensor)].append(density)
        places = sorted(kept)
        _draw_marked(axes, places, [fmean(kept[place]) for place in places], method, styles[method])
    _scale_densities(
        axes, [d for group in methods.values() for r in group for d in r.densities.values()]
    )
    axes.set_ylabel("density")
    step = -(-len(tensors) // _MAX_NAMES)
    shown = range(0, len(tensors), step)
    names = [_shorten(tensors[place]) for place in shown]
    axes.set_xticks(list(shown), names, rotation=40, ha="right", rotation_mode="anchor")
    add_legend(figure, [axes])
    return figure


def _scale_densities(axes: Axes, densities: Sequence[float]) -> None:
    """Use a logarithmic axis, with a place below all others for a tensor that lost everything."""
    lowest = min((density for density in densities if density > 0), default=1e-3)
    decades = [10.0**power for power in range(math.floor(math.log10(lowest)), 1)]
    if min(densities) > 0:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * decades[0], 1.25)
    else:
        axes.set_yscale("symlog", linthresh=decades[0], linscale=0.4)
        axes.set_ylim(bottom=-0.1 * decades[0])
        decades = [0.0, *decades]
    axes.yaxis.set_major_locator(FixedLocator(decades))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _at_request(runs: Sequence[Run], request: Request | None) -> tuple[dict[str, list[Run]], str]:
    """Choose the runs of a request, and say which it is; dense comes first."""
    chosen = [run for run in runs if run.is_dense or run.request == request]
    methods: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(chosen, key=lambda run: (not run.is_dense, run.method)):
        methods[run.method].append(run)
    if request is None:
        return methods, ""
    kind, value = request
    if kind == "budget_bytes":
        return methods, f" ({value:,.0f} bytes)"
    _, space, of_network = kind.partition(" ")
    return methods, f" (ratio {value:g}{space}{of_network})"


def _draw_marked(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], method: str, style: Style
) -> None:
    axes.plot(
        xs,
        ys,
        color=GREY if method == "dense" else style.colour,
        linestyle=style.linestyle,
        linewidth=1.2,
        marker=style.marker,
        markersize=4.5,
        markevery=max(1, len(xs) // 12),
        label=method,
    )


def _mean(runs: Sequence[Run], value: Callable[[Run], int | None]) -> float | None:
    known = [number for run in runs if (number := value(run)) is not None]
    return fmean(known) if known else None


def _shorten(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
