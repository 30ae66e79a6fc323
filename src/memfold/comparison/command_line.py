"""The command line of `scripts/compare.py`."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from omegaconf import DictConfig

from memfold.comparison.folders import OTHERS, RUNS
from memfold.comparison.packing import pack_runs
from memfold.comparison.plan import Plan, number_text, read_plan
from memfold.comparison.running import run_plan
from memfold.errors import InputError
from memfold.launching.arguments import positive_integer
from memfold.launching.composing import compose_run, prepare_data
from memfold.launching.run import Stopped
from memfold.launching.workers import StopSignal, launchers
from memfold.runs.folder import locked, writing
from memfold.training.foreign_code import named_code

__all__ = ["main"]


def main(arguments: Sequence[str], program: Path, conf: Path) -> int:
    """Run a plan, or what is left of it, and pack the artifacts.

    Args:
        arguments: The command line after the program's name.
        program: `train.py`.
        conf: Its configuration folder.

    Returns:
        The exit status: 0, also when runs failed, which the report lists; 1 after a user's mistake
        or when no run was completed (one line on stderr); 128 + the signal after Ctrl-C or SIGTERM.
    """
    options = _parser().parse_args(arguments)
    stop = StopSignal()
    try:
        plan = read_plan(options.plan)
        methods = _compose_methods(plan, conf)
        prepare_data(methods)
        named = set().union(*map(named_code, methods))
        with stop.caught():
            workers = launchers(program, options.jobs, stop.event, os.environ)
            with writing(options.out):
                options.out.mkdir(parents=True, exist_ok=True)
            with locked(options.out):
                progress = run_plan(plan, options.out, workers)
                packed = pack_runs([options.out / RUNS], plan.bits, stop.event, allow=named)
    except (Stopped, KeyboardInterrupt):
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + (stop.number or signal.SIGINT)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if len(progress.failed) == progress.num_runs:
        print(f"error: all runs failed, the last: {progress.failed[-1]}", file=sys.stderr)
        return 1
    num_completed = progress.num_runs - len(progress.failed)
    print(f"{num_completed} runs completed, {len(progress.failed)} failed, {packed} packed files")
    runs, report = options.out / RUNS, options.out / "report"
    if progress.others:
        print(
            f"not of this plan, kept in {options.out / OTHERS}: {', '.join(progress.others)}",
            file=sys.stderr,
        )
    script = program.with_name("scripts") / "report.py"
    print(shlex.join(["python", str(script), str(runs), "--out", str(report)]))
    return 0


def _compose_methods(plan: Plan, conf: Path) -> list[DictConfig]:
    """Compose one run of each method.

    Raises:
        InputError: An override is unknown.
    """
    runs = []
    for method in plan.methods:
        run, *_ = plan.compared_runs(method, plan.places(method)[0], plan.values[0])
        try:
            runs.append(compose_run(conf, run.overrides))
        except InputError as error:
            raise InputError(f"{_place_of(str(error), plan, conf, method)}: {error}") from error
    return runs


def _place_of(mistake: str, plan: Plan, conf: Path, method: str) -> str:
    """Return the entry of the plan in which a mistake of a method's run stands."""
    own = f"{plan.key}={number_text(plan.values[0])}"
    common = {"overrides": plan.overrides, "choose.key": (*plan.overrides, own)}
    for place, overrides in common.items():
        try:
            compose_run(conf, overrides)
        except InputError as error:
            if str(error) == mistake:
                return place
    return f"methods.{method}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare methods by a plan: choices on validation, then runs with all seeds.",
        epilog="The same command goes on after an interruption.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "plan", type=Path, metavar="PLAN", help="such as comparisons/fashion_mnist.yaml"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the run folders are kept"
    )
    parser.add_argument(
        "--jobs",
        type=positive_integer,
        default=psutil.cpu_count(logical=False) or 1,
        metavar="N",
        help="runs at a time; cores and GPUs are divided (default: one per core)",
    )
    return parser
