"""The command line of `scripts/reproduce.py`."""

import argparse
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from memfold.errors import InputError
from memfold.launching.composing import compose_run, prepare_data
from memfold.reproduction.grid import (
    EXPERIMENTS,
    METHODS,
    NUM_EPOCHS,
    RATIOS,
    SEEDS,
    Grid,
    Sweep,
)
from memfold.reproduction.programs import Programs
from memfold.reproduction.record import refuse_other_grid, write_record
from memfold.runs.folder import locked, writing

__all__ = ["main"]

_REPORT = "report"
_LAUNCHER = "hydra_plugins.hydra_joblib_launcher"
_T = TypeVar("_T")

_EXAMPLE = """examples:
  python scripts/reproduce.py --out outputs/paper
  python scripts/reproduce.py --out outputs/short --experiments cifar10_vgg11 --epochs 40 \\
      --jobs-per-device 4 -- data.root=/data trainer.precision=bf16-mixed

The same command goes on with what was interrupted or has failed."""


def main(arguments: Sequence[str], root: Path) -> int:
    """Run what is missing of the comparison, then write the report.

    Args:
        arguments: The command line after the program's name.
        root: The repository.

    Returns:
        The exit status: 0 when all is there, 1 after a user's mistake or when runs are missing
        (one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:end])
    out: Path = options.out
    again = shlex.join(["python", sys.argv[0], *arguments])
    try:
        grid = _grid(options, arguments[end + 1 :])
        runs = [
            compose_run(root / "conf", [f"experiment={name}", *grid.overrides])
            for name in grid.experiments
        ]
        refuse_other_grid(out, grid)
        jobs_per_device = _one("--jobs-per-device", options.jobs_per_device)
        num_parallel = _num_parallel(jobs_per_device, grid)
        train = os.path.relpath(root / "train.py")
        report = _report(root, grid, out)
        sweeps = grid.sweeps(out)
        if options.dry_run:
            for command in [*([train, *s.arguments(num_parallel)] for s in sweeps), report]:
                print(shlex.join(["python", *command]))
            return 0
        prepare_data(runs)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            write_record(out, grid)
            return _run(
                [(sweep, [train, *sweep.arguments(num_parallel)]) for sweep in sweeps],
                report,
                num_parallel,
                grid,
                again,
            )
    except KeyboardInterrupt:
        return _say_stopped(signal.SIGINT, again)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(
    sweeps: Sequence[tuple[Sweep, list[str]]],
    report: list[str],
    num_parallel: int,
    grid: Grid,
    again: str,
) -> int:
    num_runs = sum(sweep.num_runs for sweep, _ in sweeps)
    print(f"runs: {num_runs}, {num_parallel} at once, {grid.describe_schedule()} each", flush=True)
    programs, incomplete = Programs(), []
    with programs.stoppable():
        for sweep, command in sweeps:
            print(f"\n$ {shlex.join(['python', *command])}", flush=True)
            if programs.run(command) != 0:
                incomplete.append(str(sweep.folder))
            if programs.stopped_by is not None:
                return _say_stopped(programs.stopped_by, again)
        print(f"\n$ {shlex.join(['python', *report])}", flush=True)
        has_report = programs.run(report) == 0
        if programs.stopped_by is not None:
            return _say_stopped(programs.stopped_by, again)
    if incomplete:
        print(
            f"error: not complete: {', '.join(incomplete)}; run what is missing or has failed "
            f"with: {again}",
            file=sys.stderr,
        )
    return int(bool(incomplete) or not has_report)


def _say_stopped(number: int, again: str) -> int:
    print(f"error: stopped; go on with: {again}", file=sys.stderr)
    return 128 + number


def _grid(options: argparse.Namespace, overrides: Sequence[str]) -> Grid:
    return Grid(
        experiments=_values("--experiments", options.experiments, str),
        methods=_values("--methods", options.methods, str),
        ratios=_values("--ratios", options.ratios, float),
        seeds=_values("--seeds", options.seeds, int),
        epochs=_one("--epochs", options.epochs),
        overrides=tuple(overrides),
    )


def _values(option: str, text: str, kind: Callable[[str], _T]) -> tuple[_T, ...]:
    """Read values that commas separate."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        expected = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} {text}: expected {expected}, separated by commas") from error


def _one(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text}: expected a whole number of at least 1")
    return int(text)


def _num_parallel(jobs_per_device: int, grid: Grid) -> int:
    """Return how many runs there are at once, on all devices together."""
    num_devices = 1
    if "trainer=cpu" not in grid.overrides:
        import torch

        num_devices = max(1, torch.cuda.device_count())
    num_parallel = jobs_per_device * num_devices
    if num_parallel > 1 and importlib.util.find_spec(_LAUNCHER) is None:
        raise InputError(
            "several runs at once need the extra cluster: "
            "pip install -c constraints.txt -e '.[cluster]'"
        )
    return num_parallel


def _report(root: Path, grid: Grid, out: Path) -> list[str]:
    # The experiments that earlier calls have run are drawn, too; a former report is not.
    drawn = [name for name in EXPERIMENTS if name in grid.experiments or (out / name).is_dir()]
    published = root / "results" / "published"
    references = [file for name in drawn for file in sorted(published.glob(f"*_{name}.csv"))]
    return [
        os.path.relpath(root / "scripts" / "report.py"),
        *(str(out / name) for name in drawn),
        f"--out={out / _REPORT}",
        *(f"--reference={os.path.relpath(file)}" for file in references),
        f"--title=The STABLE-RPS paper's comparison, {grid.describe_schedule()}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --out DIR [options] -- [overrides of train.py]",
        description="Run the comparison of the STABLE-RPS paper and report on it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where all of it is kept")
    for option, values, what in (
        ("--experiments", EXPERIMENTS, "of conf/experiment"),
        ("--methods", METHODS, "strategies"),
        ("--ratios", [f"{ratio:g}" for ratio in RATIOS], "of all methods but dense"),
        ("--seeds", [str(seed) for seed in SEEDS], "of every cell"),
    ):
        default = ",".join(values)
        add(option, default=default, metavar="A,B", help=f"{what} (default {default})")
    add(
        "--jobs-per-device",
        default="2",
        metavar="N",
        help="runs at a time on each GPU, or on the CPU where there is none (default 2)",
    )
    add(
        "--epochs",
        default=str(NUM_EPOCHS),
        metavar="N",
        help=f"fewer than the protocol's {NUM_EPOCHS}; the drops stay at 50 and 75 %%",
    )
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser
