"""What is kept over what it costs: a line for each method."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memfold.reporting.drawing import (
    FRONT,
    GREY,
    add_legend,
    new_figure,
    set_bytes_axis,
    set_metric_axis,
    set_ratio_axis,
    title_of,
)
from memfold.reporting.metrics import is_share, name_of
from memfold.reporting.records import Reference
from memfold.reporting.statistics import Axis, Point, best, has_collapsed, near, pareto_front
from memfold.reporting.styles import Style

__all__ = ["draw_plane"]


def draw_plane(
    points: Sequence[Point],
    axis: Axis,
    styles: Mapping[str, Style],
    *,
    note: str,
    references: Sequence[Reference] = (),
) -> Figure:
    """Draw the points of one setting.

    Dense is a point and a horizontal line; the points that no other one beats have a ring. Where
    some methods have collapsed, those near the best have a panel of their own.

    Args:
        points: On `axis`.
        axis: Its x axis.
        styles: Of every method, and of every reference's.
        note: What the points have in common, for the title.
        references: Published curves; only the axis of ratios has a place for them.
    """
    setting = points[0].setting
    what = re.split("[:,]", axis.title)[0]
    title = f"{title_of(setting)}: test {name_of(setting.primary)} over {what} ({note})"
    is_split = has_collapsed(points)
    figure, panels = (
        new_figure(2, 7.6, title, stacked=True) if is_split else new_figure(1, 4.9, title)
    )
    for axes in panels:
        _draw_panel(axes, points, axis, styles, references)
    if is_split:
        top, width = best(points).y, setting.primary.sign * near(points)
        shown = [p for p in points if abs(p.y - top) <= near(points)]
        room = near(points) / 2  # intervals of few seeds may reach beyond all
        bars = [[min(bar, room) for bar in _bar(p)] for p in shown]
        ends = [
            e for p, (down, up) in zip(shown, bars, strict=True) for e in (p.y - down, p.y + up)
        ]
        ends += [top - width, top]
        edge = (max(ends) - min(ends)) / 20
        panels[0].set_ylim(min(ends) - edge, max(ends) + edge)
        panels[0].set_title("near the best")
        panels[1].set_title("all")
    add_legend(figure, panels)
    return figure


def _draw_panel(
    axes: Axes,
    points: Sequence[Point],
    axis: Axis,
    styles: Mapping[str, Style],
    references: Sequence[Reference],
) -> None:
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        lines[point.method].append(point)
    for method in sorted(lines, key=lambda name: (lines[name][0].strategy != "dense", name)):
        _draw_line(axes, lines[method], axis, styles[method])
    _draw_references(axes, references, styles)
    front = pareto_front(points)
    axes.plot(
        [point.x for point in front],
        [point.y for point in front],
        linestyle="none",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=GREY,
        markeredgewidth=1,
        label=FRONT,
    )
    axes.set_xlabel(axis.title)
    set_metric_axis(axes, points[0].setting.primary)
    _scale(axes, points, axis)


def _draw_line(axes: Axes, points: Sequence[Point], axis: Axis, style: Style) -> None:
    """Join the points of a method: by x, or by ratio where x hardly depends on it."""
    is_cost_of_storing = axis.key in ("stored_bytes", "ratio")
    if not is_cost_of_storing:
        points = sorted(points, key=lambda point: (-point.bits, point.runs[0].request))
    is_dense = points[0].strategy == "dense"
    if is_dense and points[0].runs[0].network is None:
        height = max(points, key=lambda point: point.bits).y
        axes.axhline(height, color=GREY, linewidth=1, linestyle="--", zorder=1)
    xs, ys = [point.x for point in points], [point.y for point in points]
    if not is_cost_of_storing:
        spread = [point.x_std or 0 for point in points]
        axes.errorbar(xs, ys, xerr=spread, color=style.colour, fmt="none", alpha=0.3, zorder=2)
    axes.errorbar(
        xs,
        ys,
        yerr=list(zip(*map(_bar, points), strict=True)),
        color=style.colour,
        linestyle="none" if is_dense else style.linestyle,
        marker=style.marker,
        markersize=7 if style.marker in "*PX" else 5.5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
        label=points[0].method,
        zorder=3,
    )


def _bar(point: Point) -> tuple[float, float]:
    """Return how far its interval reaches down and up; a share ends at nothing and at all."""
    half = point.y_half or 0.0
    is_cut = is_share(point.setting.primary)
    return (min(half, point.y), min(half, 1 - point.y)) if is_cut else (half, half)


def _draw_references(
    axes: Axes, references: Sequence[Reference], styles: Mapping[str, Style]
) -> None:
    curves: dict[str, list[Reference]] = defaultdict(list)
    for reference in references:
        curves[reference.method].append(reference)
    for method, curve in sorted(curves.items()):
        curve = sorted(curve, key=lambda reference: reference.ratio)
        axes.plot(
            [reference.ratio for reference in curve],
            [reference.accuracy for reference in curve],
            color=styles[method].colour,
            linestyle="--",
            marker=styles[method].marker,
            markersize=4,
            markerfacecolor="white",
            linewidth=1,
            alpha=0.8,
            label=f"{method}, published",
        )


def _scale(axes: Axes, points: Sequence[Point], axis: Axis) -> None:
    if axis.key == "ratio":
        is_asked = all(p.requested_ratio is not None or p.strategy == "dense" for p in points)
        set_ratio_axis(axes, sorted({p.x for p in points}) if is_asked else [])
    elif axis.key.endswith("_bytes"):
        set_bytes_axis(axes, is_log=axis.is_log)
    elif axis.is_log:
        axes.set_xscale("log")
