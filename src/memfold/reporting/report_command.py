"""What `scripts/report.py` does."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from memfold.errors import InputError
from memfold.files import make_folder, write_text_atomically
from memfold.reporting.reading import read
from memfold.reporting.records import Comparison
from memfold.reporting.references import read_references
from memfold.reporting.run_lines import RUN_LINES, to_run_lines
from memfold.reporting.statistics import num_trainings
from memfold.reporting.tables import to_csv, to_markdown
from memfold.reporting.unlike_runs import sort_problems

__all__ = ["main", "write_report"]

_PAGE = "index.html"
_PLOTS = "plots"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read runs, write a report, and say what was drawn and what was not.

    Args:
        arguments: Of the command line; those of the process if `None`.

    Returns:
        The exit status: 0 if anything was drawn.
    """
    options = _parser().parse_args(arguments)
    try:
        comparison = _compare(options.runs, options.reference, is_joined=options.join_backbones)
        plots = write_report(comparison, options.out, title=options.title)
    except InputError as error:
        _print(f"error: {error}", file=sys.stderr)
        return 1
    runs = comparison.runs
    num_methods = len({run.method for run in runs})
    _print(
        f"{_count(num_trainings(runs), 'run')} of {_count(num_methods, 'method')} in "
        f"{_count(len({run.setting for run in runs}), 'setting')} (data, backbone, metric), "
        f"{_count(len(comparison.problems), 'problem')}"
    )
    _print(f"{plots} figures in {options.out / _PLOTS}, as PNG and PDF")
    _print(f"tables and runs: {options.out}/table.md, table.csv, {RUN_LINES}")
    _print(f"report: {options.out / _PAGE}")
    return 0


def write_report(comparison: Comparison, folder: Path, *, title: str) -> int:
    """Write all files of a report; others in the folder stay.

    Args:
        comparison: One run at least.
        folder: Is made if need be.
        title: Of the page and the tables.

    Returns:
        The number of figures.

    Raises:
        InputError: A file cannot be written.
    """
    # Not before there is something to draw: both take a while to import.
    from memfold.reporting.page import write_page
    from memfold.reporting.plots import draw

    make_folder(folder)
    for name, text in (
        (RUN_LINES, to_run_lines(comparison)),
        ("table.csv", to_csv(comparison)),
        ("table.md", to_markdown(comparison, title)),
    ):
        write_text_atomically(folder / name, _as_utf8(text))
    plots = draw(comparison, folder / _PLOTS)
    write_page(comparison, folder / _PAGE, title=title)
    return len(plots) // 2


def _compare(
    paths: Sequence[Path], reference_files: Sequence[Path], *, is_joined: bool
) -> Comparison:
    """Read everything, and print what is wrong with it.

    Raises:
        InputError: There is nothing to draw, or published curves cannot be read.
    """
    runs, problems = read(paths, is_joined=is_joined)
    references, unknown = read_references(reference_files, {run.setting for run in runs})
    problems = sort_problems([*problems, *unknown])
    for problem in problems:
        _print(f"{problem.folder}: {problem.reason}", file=sys.stderr)
    if not runs:
        given = ", ".join(map(str, paths))
        raise InputError(f"nothing to draw: no completed run in {given}")
    return Comparison(tuple(runs), tuple(problems), tuple(references))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Compare runs: a page to look at, plots, tables, and all of it as data.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help=f"run folders, sweep folders, folders of such, or the {RUN_LINES} of a report",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the report")
    parser.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="published curves: a CSV of method,dataset,model,ratio,accuracy; may be repeated",
    )
    parser.add_argument(
        "--join-backbones",
        action="store_true",
        help="show networks of all backbones on the same data together, for comparisons by bytes",
    )
    parser.add_argument("--title", default="Comparison of runs", help="of the page")
    return parser


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print(line: str, file: TextIO | None = None) -> None:
    """Print on one line, whatever a name holds and the terminal can show."""
    stream = sys.stdout if file is None else file
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line)
    encoding = stream.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _as_utf8(text: str) -> str:
    """Show what no UTF-8 file can hold, as the name of a folder may have."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
