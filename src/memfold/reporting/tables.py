"""The comparison as text: `table.md` to read, `table.csv` to compute with."""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from memfold.reporting.metrics import axis_title, columns, unit_mark, write
from memfold.reporting.recipes import short_recipe
from memfold.reporting.records import Comparison, Problem, Reference, Run
from memfold.reporting.statistics import (
    AXES,
    Cell,
    Point,
    WinMatrix,
    best,
    num_trainings,
    points,
    win_matrix,
)
from memfold.runs.primary import ACCURACY

__all__ = ["to_csv", "to_markdown"]

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_TIE = """\
A tie: two means differ by at most two standard errors of their difference, from the spread over
seeds pooled over both, and the test does not tell them apart. With three seeds, one of about eight
cells between equally good methods is not a tie by this rule. With one seed each, nothing is known
of the spread, and only equal {values} tie.

Told apart: by paired t-tests of the best against each other method over the seeds that both have,
at 5 % after Holm's correction for all tests of the cell. With three seeds these tests see little: a
single one takes a difference of 4.3 standard errors, the first of twelve 15.4, so that what they do
not tell apart is not shown to be equal. The best was chosen by the same runs, which makes its
p-values somewhat too small.

Equal ratios are equal numbers of learned values, not equal bytes: sparse methods store indices
besides."""

_Value = Callable[[Run], float | None]
_NUMBERS: tuple[tuple[str, _Value], ...] = (
    ("stored_bytes", lambda run: run.stored_bytes),
    ("stored_ratio", lambda run: run.stored_ratio),
    ("index_bytes", lambda run: run.index_bytes),
    ("train_state_bytes", lambda run: run.train_state_bytes),
    ("peak_bytes", lambda run: run.peak_bytes),
    ("step_seconds", lambda run: run.step_seconds),
    ("fit_seconds", lambda run: run.fit_seconds),
    ("epochs", lambda run: run.epochs),
    ("steps", lambda run: run.steps),
    ("trainings", lambda run: run.rounds),
    ("operations", lambda run: run.operations),
)
_ASKED = ("method", "bits", "ratio", "n")
_COSTS = (
    "stored bytes",
    "of them indices",
    "train state, bytes",
    "peak, bytes",
    "step, ms",
    "trainings",
    "training, s",
    "multiply-adds",
)


def to_csv(comparison: Comparison) -> str:
    """Write a row for each method, bits and ratio of each setting: plain numbers, no rounding.

    Every metric has columns of its own: of shares, such as accuracies, in [0, 1].
    """
    metrics = list(dict.fromkeys(columns(run.setting.primary) for run in comparison.runs))
    heads = ["data", "backbone", "method", "strategy", "bits", "requested_ratio", "budget_bytes"]
    heads += ["num_seeds", "seeds"]
    heads += ["folds"] if any(run.fold is not None for run in comparison.runs) else []
    heads += [name for test, _ in metrics for name in (test, f"{test}_std", f"{test}_half_width")]
    heads += ["ratio", *(val for _, val in metrics), *(name for name, _ in _NUMBERS)]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for point in _rows(comparison.runs):
        test, val = columns(point.setting.primary)
        row = {
            "data": point.setting.data,
            "backbone": (own.name if (own := point.runs[0].network) else point.setting.backbone),
            "method": point.method,
            "strategy": point.strategy,
            "bits": point.bits,
            "requested_ratio": point.requested_ratio,
            "budget_bytes": point.budget_bytes,
            "num_seeds": len({run.seed for run in point.runs}),
            "seeds": _list(run.seed for run in point.runs),
            "folds": _list(run.fold for run in point.runs if run.fold is not None),
            test: point.y,
            f"{test}_std": point.y_std,
            f"{test}_half_width": point.y_half,
            "ratio": _mean(point, lambda run: run.ratio),
            val: _mean(point, lambda run: run.val),
        }
        writer.writerow(row | {name: _mean(point, value) for name, value in _NUMBERS})
    return text.getvalue()


def to_markdown(comparison: Comparison, title: str) -> str:
    """Write the tables, the win matrices and the problems.

    Args:
        comparison: What to show.
        title: Of the page.
    """
    lines = [
        f"# {_escape(title)}",
        "",
        f"{_count(num_trainings(comparison.runs), 'run')}. Means over seeds; {_PLUS_MINUS} is "
        "their sample standard deviation, 95 % Student's interval of the mean; bold: the best of "
        "a ratio and bits.",
    ]
    matrices = win_matrix(comparison.runs)
    for setting in sorted({run.setting for run in comparison.runs}):
        rows = [p for p in _rows(comparison.runs) if p.setting == setting]
        rows.sort(key=_at_its_ratio)
        tops = _tops(rows)
        lines += ["", f"## {_escape(', '.join(setting.parts))}", ""]
        training = short_recipe([run for run in comparison.runs if run.setting == setting])
        lines += [f"Training: {_escape(training)}.", ""] if training else []
        heads = (*_ASKED, _escape(axis_title(setting.primary)), "95 %", *_COSTS)
        lines += _table(heads, (_cells(row, is_best=row in tops) for row in rows))
        for matrix in matrices:
            if matrix.setting == setting:
                lines += _matrix(matrix)
        lines += _published([r for r in comparison.references if r.setting == setting])
    if matrices:
        are_accuracies = all(matrix.setting.primary == ACCURACY for matrix in matrices)
        tie = _TIE.format(values="accuracies" if are_accuracies else "values")
        lines += ["", "## What is a tie", "", *tie.splitlines()]
    return "\n".join([*lines, *_problems(comparison.problems)]) + "\n"


def _rows(runs: Iterable[Run]) -> list[Point]:
    def order(point: Point) -> tuple[object, ...]:
        kind, value = point.runs[0].request
        is_dense = point.strategy == "dense"
        return point.setting, not is_dense, point.method, -point.bits, kind, -value

    return sorted(points(runs, AXES["stored_bytes"]), key=order)


def _list(numbers: Iterable[int]) -> str:
    return " ".join(str(number) for number in sorted(set(numbers)))


def _at_its_ratio(point: Point) -> tuple[object, ...]:
    """Sort what was asked for alike by what is better."""
    kind, value = point.runs[0].request
    return point.strategy != "dense", -point.bits, kind != "ratio", kind, -value, -point.quality


def _tops(points: Iterable[Point]) -> list[Point]:
    """Return the best of each ratio and bits, where there are several."""
    groups: dict[object, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.bits, point.runs[0].request].append(point)
    several = [group for group in groups.values() if len(group) > 1]
    return [p for group in several for p in group if p.quality == best(group).quality]


def _cells(point: Point, *, is_best: bool) -> list[str]:
    values = {name: _mean(point, value) for name, value in _NUMBERS}
    step = values["step_seconds"]
    trainings, fit, operations = (values[n] for n in ("trainings", "fit_seconds", "operations"))
    return [
        _escape(point.method),
        str(point.bits),
        _escape(point.runs[0].asked),
        str(len(point.runs)),
        f"**{_mean_and_spread(point)}**" if is_best else _mean_and_spread(point),
        _interval(point),
        *(
            "-" if values[name] is None else f"{values[name]:,.0f}"
            for name in ("stored_bytes", "index_bytes", "train_state_bytes", "peak_bytes")
        ),
        "-" if step is None else f"{1000 * step:.3g}",
        "-" if trainings is None else f"{trainings:g}",
        "-" if fit is None else f"{fit:.1f}",
        "-" if operations is None else f"{operations:,.0f}",
    ]


def _matrix(matrix: WinMatrix) -> list[str]:
    """List who is best where, then every method against every other one."""
    lines = ["", f"### Who wins, at {matrix.bits} bits", ""]
    lines += _table(
        ("asked for", "best", "ties with it", "told apart"), map(_outcome, matrix.cells)
    )
    lines += ["", "Wins, ties and losses of the row against the column:", ""]
    body = []
    for one in matrix.methods:
        duels = [matrix.duels.get((one, other)) for other in matrix.methods]
        cells = [
            "-" if duel is None else f"{duel.wins}-{duel.ties}-{duel.losses}" for duel in duels
        ]
        body.append([_escape(one), *cells])
    return lines + _table(["", *map(_escape, matrix.methods)], body)


def _outcome(cell: Cell) -> list[str]:
    top = cell.points[0]
    ties = ", ".join(_escape(method) for method in cell.winners[1:])
    note = " (one seed each)" if cell.is_one_seed else ""
    value = f"{_mean_and_spread(top)}{unit_mark(top.setting.primary)}"
    apart = f"{len(cell.separated)} of {len(cell.points) - 1}"
    return [_escape(top.runs[0].asked), f"{_escape(top.method)}: {value}{note}", ties or "-", apart]


def _published(references: Sequence[Reference]) -> list[str]:
    if not references:
        return []
    rows = [
        [_escape(r.method), f"{r.ratio:g}", f"{100 * r.accuracy:.2f}"]
        for r in sorted(references, key=lambda r: (r.method, -r.ratio))
    ]
    return ["", "### Published", "", *_table(("method", "ratio", "accuracy, %"), rows)]


def _problems(problems: Sequence[Problem]) -> list[str]:
    if not problems:
        return []
    lines = [f"- {_escape(p.folder)}: {_escape(p.reason)}" for p in problems]
    return ["", f"## {_count(len(problems), 'problem')}", "", *lines]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Align numbers to the right, the first column to the left."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _mean_and_spread(point: Point) -> str:
    primary = point.setting.primary
    mean = write(point.y, primary)
    if point.y_std is None:
        return mean
    return f"{mean} {_PLUS_MINUS} {write(point.y_std, primary, mean=point.y)}"


def _interval(point: Point) -> str:
    if point.y_half is None:
        return "-"
    ends = (point.y - point.y_half, point.y + point.y_half)
    return " to ".join(write(end, point.setting.primary, mean=point.y) for end in ends)


def _mean(point: Point, value: _Value) -> float | None:
    known = [number for run in point.runs if (number := value(run)) is not None]
    return statistics.fmean(known) if known else None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _escape(text: str) -> str:
    """Keep what a folder or an error says from being read as Markdown or HTML."""
    for mark in "\\`*[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
