"""`scripts/reproduce.py`: the comparison of the STABLE-RPS paper, its sweeps and its report."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from memfold.errors import InputError
from memfold.studies.arguments import (
    command_parser,
    ending_in_one_line,
    split_overrides,
    working_in,
)
from memfold.studies.composing import compose_run, prepare_data
from memfold.studies.executor import Stopped, StopSignal
from memfold.studies.paper import EXPERIMENTS, METHODS, NUM_EPOCHS, RATIOS, RECORD, SEEDS, Grid
from memfold.studies.process import run_program

__all__ = ["main"]

_REPORT = "report"
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
    own, overrides = split_overrides(arguments)
    options = _parser().parse_args(own)
    out: Path = options.out
    again = shlex.join(["python", sys.argv[0], *arguments])

    def body(stop: StopSignal) -> int:
        grid = _grid(options, overrides)
        experiments = [f"experiment={name}" for name in grid.experiments]
        runs = [compose_run(root / "conf", [one, *grid.overrides]) for one in experiments]
        record = grid.admit(out)
        num_parallel = _num_parallel(_one("--jobs-per-device", options.jobs_per_device), grid)
        train = os.path.relpath(root / "train.py")
        commands = {
            str(sweep.folder): [train, *sweep.arguments(num_parallel)] for sweep in grid.sweeps(out)
        }
        report = _report(root, grid, out)
        if options.dry_run:
            for command in [*commands.values(), report]:
                print(shlex.join(["python", *command]))
            return 0
        prepare_data(runs)
        with working_in(out, stop):
            record.write(out / RECORD)
            num_runs = sum(sweep.num_runs for sweep in grid.sweeps(out))
            how = f"{num_parallel} at once, {grid.describe_schedule()} each"
            print(f"runs: {num_runs}, {how}", flush=True)
            incomplete = [
                name for name, command in commands.items() if not _is_complete(command, stop)
            ]
            has_report = _is_complete(report, stop)
        if incomplete:
            print(
                f"error: not complete: {', '.join(incomplete)}; run what is missing or has failed "
                f"with: {again}",
                file=sys.stderr,
            )
        return int(bool(incomplete) or not has_report)

    return ending_in_one_line(body, f"error: stopped; go on with: {again}")


def _is_complete(command: Sequence[str], stop: StopSignal) -> bool:
    """Run a program, whose output is shown as it comes.

    Raises:
        Stopped: It, or this program, was told to stop.
    """
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    status, _ = run_program(command, wanted_stop=stop.wanted)
    if stop.event.is_set():
        raise Stopped
    return status == 0


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
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise InputError(f"{option} {text}: expected a whole number of at least 1")
    return int(text)


def _num_parallel(jobs_per_device: int, grid: Grid) -> int:
    """Return how many runs there are at once, on all devices together."""
    num_devices = 1
    if "trainer=cpu" not in grid.overrides:
        import torch

        num_devices = max(1, torch.cuda.device_count())
    return jobs_per_device * num_devices


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
    parser = command_parser(
        "Run the comparison of the STABLE-RPS paper and report on it.",
        _EXAMPLE,
        "%(prog)s --out DIR [options] -- [overrides of train.py]",
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
