"""Means over seeds, the Pareto front, and who wins where.

A tie: two means differ by no more than `TIE_ERRORS` standard errors of their difference, where the
spread over seeds is pooled over both (see `is_tie`), and no test over pairs of seeds tells them
apart (see `Cell.p_values`).
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from memfold.reporting.inference import CONFIDENCE, half_width, holm, paired_p_value
from memfold.reporting.metrics import is_share
from memfold.reporting.records import Curve, Run, Setting

__all__ = [
    "AXES",
    "NEGLIGIBLE_COST",
    "TIE_ERRORS",
    "Axis",
    "Cell",
    "Duel",
    "Point",
    "WinMatrix",
    "at_best_bits",
    "at_most_bits",
    "best",
    "common_request",
    "has_collapsed",
    "is_tie",
    "mean_curve",
    "near",
    "num_trainings",
    "pareto_front",
    "points",
    "win_matrix",
]

TIE_ERRORS = 2.0
NEGLIGIBLE_COST = 0.01
"""Relative difference in cost that saves nothing: some bytes of metadata, the noise of a clock."""
_NEAR_SHARES = 0.1
_NEAR_PART = 0.2  # of the best, for other metrics
_FAR = 2.5  # times what is near
_ROUNDING = 1e-9  # relative, of values that were averaged in another order


@dataclass(frozen=True)
class Axis:
    """What the metric is drawn over."""

    key: str
    title: str
    """With its unit."""
    is_log: bool
    value: Callable[[Run], float | None]
    """`None` for a run in which it was not measured."""
    often_alike: bool = False
    """Whether most methods cost the same: the axis is for runs that differ on it."""


@dataclass(frozen=True)
class Point:
    """The runs of one method that differ in nothing but their seed."""

    setting: Setting
    method: str
    strategy: str
    bits: int
    requested_ratio: float | None
    budget_bytes: int | None
    x: float
    """Mean on the axis."""
    x_std: float | None
    y: float
    """Mean of the setting's metric on the test split."""
    y_std: float | None
    """Sample standard deviation over seeds; `None` for one seed."""
    runs: tuple[Run, ...]

    @property
    def quality(self) -> float:
        """Its mean, or that with a minus where less is better: more is always better."""
        return self.setting.primary.sign * self.y

    @property
    def y_half(self) -> float | None:
        """Half of the interval of the mean (`half_width`); `None` for one seed."""
        return half_width(self.y_std, len(self.runs))


@dataclass(frozen=True)
class Cell:
    """All methods at what was asked of them: a ratio, or a number of bytes."""

    requested_ratio: float | None
    budget_bytes: int | None
    points: tuple[Point, ...]
    """One of each method that was run, best mean first; on the axis of stored bytes."""
    winners: tuple[str, ...]
    """The method with the best mean, and those that tie with it."""
    p_values: tuple[float | None, ...]
    """Of each point: of the paired test against the best over the seeds that both have, after
    Holm's correction for all tests of the cell; `None` for the best and where there is no test."""

    @property
    def separated(self) -> tuple[str, ...]:
        """The methods whose mean the tests tell from the best one."""
        pairs = zip(self.points, self.p_values, strict=True)
        return tuple(point.method for point, p in pairs if _is_small(p))

    @property
    def is_one_seed(self) -> bool:
        """Whether no method has a second seed, so that nothing is known of the spread."""
        return all(len(point.runs) == 1 for point in self.points)


@dataclass(frozen=True)
class Duel:
    """One method against another, over the cells that both were run in."""

    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class WinMatrix:
    """Which method wins where, in one setting and at one number of bits."""

    setting: Setting
    bits: int
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Those with two methods or more; ratios first, the largest first, then bytes."""
    duels: Mapping[tuple[str, str], Duel]
    """(A, B) -> A against B; both orders are there."""


def _requested_ratio(run: Run) -> float | None:
    return None if run.network else run.requested_ratio if run.is_near else run.ratio


AXES: dict[str, Axis] = {
    axis.key: axis
    for axis in (
        Axis("stored_bytes", "stored bytes", True, lambda run: run.stored_bytes),
        Axis("ratio", "ratio: stored learned values / weights", True, _requested_ratio),
        Axis("peak_bytes", "peak memory of training, bytes", False, lambda run: run.peak_bytes),
        Axis("fit_seconds", "time of training, seconds", False, lambda run: run.fit_seconds),
        Axis("trainings", "number of trainings", False, lambda run: run.rounds, often_alike=True),
        Axis(
            "operations",
            "operations: multiply-adds, forward",
            False,
            lambda run: run.operations,
            often_alike=True,
        ),
    )
}


def points(runs: Iterable[Run], axis: Axis) -> list[Point]:
    """Average over seeds.

    Args:
        runs: Of any settings. Those without a value on the axis are left out; settings whose runs
            all have the same are, where that is the rule on this axis.
        axis: One of `AXES`.

    Returns:
        One point for each setting, method, bits and requested ratio (or requested bytes, or
        else the ratio that came out, rounded), sorted by x.
    """
    groups: dict[object, list[tuple[float, Run]]] = defaultdict(list)
    measured = [(x, run) for run in runs if (x := axis.value(run)) is not None]
    spans: dict[Setting, set[float]] = defaultdict(set)
    for x, run in measured:
        spans[run.setting].add(x)
    for x, run in measured:
        if not axis.often_alike or _differ(spans[run.setting]):
            groups[run.setting, run.method, run.bits, run.request].append((x, run))
    found = [_average(group) for group in groups.values()]
    return sorted(found, key=lambda p: (p.x, p.setting, p.method, p.bits))


def _differ(costs: Collection[float]) -> bool:
    return max(costs) > (1 + NEGLIGIBLE_COST) * min(costs)


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points of each setting that no other one beats, sorted by x.

    One beats another when neither its x is higher, but for `NEGLIGIBLE_COST`, nor its mean worse,
    and one of them is better.
    """
    points = sorted(points, key=lambda p: (p.x, -p.quality))
    return [point for point in points if not any(_beats(other, point) for other in points)]


def at_best_bits(points: Iterable[Point]) -> list[Point]:
    """Return the points of each method, at any bits, that none of its own beats, sorted by x."""
    methods: dict[object, list[Point]] = defaultdict(list)
    for point in points:
        methods[point.setting, point.method].append(point)
    fronts = [point for own in methods.values() for point in pareto_front(own)]
    return sorted(fronts, key=lambda p: (p.x, -p.quality))


def best(points: Iterable[Point]) -> Point:
    """Return the point of a setting with the best mean."""
    return max(points, key=lambda point: point.quality)


def near(points: Sequence[Point]) -> float:
    """Return how much worse than the best mean of a setting is still near it.

    Of shares 0.1, of other metrics a fifth of the best itself. What is near is shown enlarged where
    the rest is far away.
    """
    top = best(points)
    if is_share(top.setting.primary):
        return _NEAR_SHARES
    return _NEAR_PART * (abs(top.y) or max(abs(point.y) for point in points) or 1.0)


def has_collapsed(points: Sequence[Point]) -> bool:
    """Return whether some means are so far from the best that the others cannot be told."""
    worst = min(point.quality for point in points)
    return worst < best(points).quality - _FAR * near(points)


def at_most_bits(runs: Iterable[Run]) -> list[Run]:
    """Keep, of each method at each request, the runs with the most bits: what was trained.

    What was packed into fewer bits later has the same training, which should not count twice.
    """
    runs = list(runs)
    most: dict[object, int] = {}
    for run in runs:
        key = (run.setting, run.method, run.request)
        most[key] = max(run.bits, most.get(key, 0))
    return [run for run in runs if run.bits == most[run.setting, run.method, run.request]]


def common_request(runs: Iterable[Run]) -> tuple[str, float] | None:
    """Return the request that most methods of a setting's network have; dense has none.

    Of several, the one in the middle: at the largest, methods hardly differ, at the smallest most
    have collapsed.
    """
    methods: dict[tuple[str, float], set[str]] = defaultdict(set)
    for run in runs:
        if not (run.is_dense or run.network):
            methods[run.request].add(run.method)
    most = max(map(len, methods.values()), default=0)
    common = sorted(request for request, names in methods.items() if len(names) == most)
    return common[len(common) // 2] if common else None


def num_trainings(runs: Iterable[Run]) -> int:
    """Count runs; what was packed in several numbers of bits was trained once."""
    return len({(run.folder, run.method, run.seed, run.command) for run in runs})


def mean_curve(runs: Iterable[Run], name: str) -> Curve | None:
    """Average a metric over seeds, between the first and the last step that all of them reach.

    Returns:
        A point at each step of the curve with the most; the others are straight between theirs.
        `None` without any.
    """
    curves = [c for run in runs if (c := run.curves.get(name)) is not None and c.steps]
    if not curves:
        return None
    start = max(curve.steps[0] for curve in curves)
    end = min(curve.steps[-1] for curve in curves)
    longest = max(curves, key=lambda curve: len(curve.steps))
    steps = [step for step in longest.steps if start <= step <= end]
    if not steps:
        return None
    values = [np.interp(steps, curve.steps, curve.values) for curve in curves]
    return Curve(tuple(steps), tuple(np.mean(values, axis=0).tolist()))


def is_tie(one: Point, other: Point) -> bool:
    """Return whether the difference of two means is lost in the noise of the seeds.

    With the sample variances pooled over both, s^2, the standard error of the difference is
    s sqrt(1/n + 1/m) for n and m seeds (Welch's, where n = m). It is a tie up to `TIE_ERRORS` of
    them. That is a mild test: of two methods that are equally good, with three seeds each, one
    "wins" in about every eighth cell. With one seed each, only equal values tie.
    """
    difference = abs(one.y - other.y)
    rounding = _ROUNDING * max(abs(one.y), abs(other.y))
    n, m = len(one.runs), len(other.runs)
    if n + m == 2:
        return difference <= rounding
    squares = (n - 1) * (one.y_std or 0.0) ** 2 + (m - 1) * (other.y_std or 0.0) ** 2
    error = math.sqrt(squares / (n + m - 2) * (1 / n + 1 / m))
    return difference <= TIE_ERRORS * error + rounding


def win_matrix(runs: Iterable[Run]) -> list[WinMatrix]:
    """Compare the means of all methods wherever the same was asked of them.

    Equal ratios are equal numbers of learned values, not of bytes: sparse methods store indices
    besides. Only runs of which bytes were asked (`budget_bytes`) compare at equal stored bytes.
    The dense model, of which nothing is asked, is left out.

    Returns:
        One for each setting and number of bits in which two methods can be compared.
    """
    by_cell: dict[tuple[Setting, int], dict[object, list[Point]]] = {}
    for point in points(runs, AXES["stored_bytes"]):
        if point.requested_ratio is not None or point.budget_bytes is not None:
            cells = by_cell.setdefault((point.setting, point.bits), defaultdict(list))
            cells[point.runs[0].request].append(point)
    matrices = []
    for (setting, bits), cells in sorted(by_cell.items(), key=lambda i: (i[0][0], -i[0][1])):
        shared = sorted((_cell(group) for group in cells.values()), key=_ratios_first)
        shared = [cell for cell in shared if len(cell.points) > 1]
        if shared:
            methods = tuple(sorted({point.method for cell in shared for point in cell.points}))
            matrices.append(WinMatrix(setting, bits, methods, tuple(shared), _duels(shared)))
    return matrices


def _average(group: list[tuple[float, Run]]) -> Point:
    group = sorted(group, key=lambda item: (item[1].seed, item[1].fold or 0, item[1].folder))
    runs = tuple(run for _, run in group)
    x, x_std = _mean_and_std([x for x, _ in group])
    y, y_std = _mean_and_std([run.test for run in runs])
    first = runs[0]
    requested_ratio = first.requested_ratio if first.is_near else None
    return Point(
        first.setting,
        first.method,
        first.strategy,
        first.bits,
        requested_ratio,
        first.budget_bytes if requested_ratio is None else None,
        x,
        x_std,
        y,
        y_std,
        runs,
    )


def _mean_and_std(values: list[float]) -> tuple[float, float | None]:
    # Exact, so that seeds at one ratio stand where a single one would: fmean((.1, .1, .1)) > .1.
    mean = float(statistics.mean(values))
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _beats(one: Point, other: Point) -> bool:
    return (
        one.setting == other.setting
        and one.x <= other.x * (1 + NEGLIGIBLE_COST)
        and one.quality >= other.quality
        and (one.x < other.x or one.quality > other.quality)
    )


def _cell(group: list[Point]) -> Cell:
    top, *others = ranked = sorted(group, key=lambda p: (-p.quality, p.method))
    values = [{(run.seed, run.fold): run.test for run in point.runs} for point in ranked]
    p_values = holm([paired_p_value(values[0], own) for own in values[1:]])
    ties = [p for p, q in zip(others, p_values, strict=True) if is_tie(top, p) and not _is_small(q)]
    winners = tuple(point.method for point in (top, *ties))
    return Cell(top.requested_ratio, top.budget_bytes, tuple(ranked), winners, (None, *p_values))


def _is_small(p_value: float | None) -> bool:
    return p_value is not None and p_value <= 1 - CONFIDENCE


def _duels(cells: Iterable[Cell]) -> dict[tuple[str, str], Duel]:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in cells:
        top, losers = cell.points[0], {p.method for p in cell.points} - set(cell.winners)
        for one, other in permutations(cell.points, 2):
            is_told = top in (one, other) and {one.method, other.method} & losers
            is_even = is_tie(one, other) and not is_told
            outcome = 1 if is_even else 0 if one.quality > other.quality else 2
            counts[one.method, other.method][outcome] += 1
    return {pair: Duel(*numbers) for pair, numbers in sorted(counts.items())}


def _ratios_first(cell: Cell) -> tuple[bool, float, str]:
    kind, value = cell.points[0].runs[0].request
    return kind == "budget_bytes", -value, kind
