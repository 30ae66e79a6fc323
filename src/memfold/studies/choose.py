"""`scripts/compare.py`: every method chooses on validation, then runs with its choice and seeds."""

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from memfold.errors import InputError
from memfold.file_models import read_yaml
from memfold.files import write_text_atomically
from memfold.runs.folder import CHOICES, OTHERS, RUNS
from memfold.runs.primary import ACCURACY, primary_of
from memfold.studies.arguments import (
    add_jobs,
    command_parser,
    ending_in_one_line,
    working_in,
)
from memfold.studies.choose_plan import Choose, Plan, PlannedRun, number_text
from memfold.studies.composing import compose_run, group_in_wandb, prepare_data
from memfold.studies.packing import pack_runs
from memfold.studies.process import StopSignal
from memfold.studies.put_aside import sort_runs
from memfold.studies.runner import Outcome, Runner, metric_of, run_all, runners
from memfold.training.foreign_code import named_code

__all__ = ["Progress", "compose_methods", "doubts", "in_group", "main", "run_plan"]

_Group = tuple[str, float | None]
"""A method, and the budget at which it chooses."""
_ERRORS = 3.0
"""Standard errors above chance that are still noise."""
_HARDLY = 0.1
"""Of what the best run of the plan has learnt: less is as good as nothing."""


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

    def body(stop: StopSignal) -> int:
        plan = read_yaml(options.plan, Plan)
        methods = compose_methods(plan, conf)
        prepare_data(methods.values())
        named = set().union(*map(named_code, methods.values()))
        with working_in(options.out, stop):
            progress = run_plan(plan, methods, options.out, runners(program, options.jobs, stop))
            num_packed = pack_runs(options.out / RUNS, plan.bits, stop.event, allow=named)
        return _conclude(progress, num_packed, plan, options.out, program)

    return ending_in_one_line(body)


@dataclass
class Progress:
    """What has been run so far; prints a line for each run."""

    num_runs: int
    failed: list[str] = field(default_factory=list)
    """One line for each run that failed."""
    others: list[str] = field(default_factory=list)
    """Names of runs that this plan does not make: another one did, or other choices."""
    doubtful: list[str] = field(default_factory=list)
    """Groups whose choice may not be one, and why."""
    _num_done: int = 0

    def note(self, name: str, outcome: Outcome) -> None:
        """Take note of a run that has ended."""
        value, error = _judge(outcome)
        self._num_done += 1
        if error:
            self.failed.append(f"{name}: {error}")
        metric = primary_of(outcome.result).name
        text = f"failed: {error}" if value is None else f"{metric} {value:.4f}"
        place = f"[{self._num_done}/{self.num_runs}]"
        print(f"{place} {name}: {text} ({outcome.seconds:.0f} s)", flush=True)


def run_plan(
    plan: Plan, methods: Mapping[str, DictConfig], folder: Path, workers: Sequence[Runner]
) -> Progress:
    """Run what is missing of a plan.

    Runs that this plan does not make are moved from `runs/` to `other_runs/`, and come back when a
    plan makes them.

    Args:
        plan: What to run.
        methods: See `compose_methods`.
        folder: Of the comparison; locked by the caller.
        workers: One for each run at a time.

    Raises:
        Stopped: The user, or the machine, wants all runs to stop.
        InputError: The folder cannot be written.
    """
    tried = {group: plan.tried_runs(*group) for group in plan.groups}
    num_compared = sum(len(plan.compared_runs(*group, None)) for group in plan.groups)
    progress = Progress(sum(map(len, tried.values())) + num_compared)
    chosen: Mapping[Any, float | None] = dict.fromkeys(plan.groups)
    if plan.choose is not None:
        chosen = _choose(plan.choose, tried, methods, folder, workers, progress)
    runs = [
        (run.name, in_group(run, methods[run.method]))
        for group in plan.groups
        for run in plan.compared_runs(*group, chosen[group])
    ]
    names = [name for name, _ in runs]
    progress.others = sort_runs(folder / RUNS, folder / OTHERS, names, workers[0].stop.event)
    run_all(runs, folder / RUNS, workers, progress.note)
    return progress


def _choose(
    choose: Choose,
    tried: Mapping[_Group, Sequence[PlannedRun]],
    methods: Mapping[str, DictConfig],
    folder: Path,
    workers: Sequence[Runner],
    progress: Progress,
) -> dict[_Group, float | None]:
    """Try all values, write `choices.csv`, and return the best value of each group."""
    named = [
        (run.name, in_group(run, methods[run.method], "tune"))
        for runs in tried.values()
        for run in runs
    ]
    outcomes = run_all(named, folder / CHOICES, workers, progress.note)
    best = {group: _best(runs, outcomes) for group, runs in tried.items()}
    results = {name: o.result for name, o in outcomes.items() if _judge(o)[0] is not None}
    notes = {run.name: doubts(run, tried[group], results) for group, run in best.items()}
    progress.doubtful = [
        f"{' '.join(filter(None, (run.method, number_text(run.budget))))} "
        f"({', '.join(notes[run.name])})"
        for run in best.values()
        if notes[run.name]
    ]
    table = _table(choose.budget_key, [*tried.values()], notes, outcomes)
    write_text_atomically(folder / f"{CHOICES}.csv", table)
    return {group: run.value for group, run in best.items()}


def in_group(run: PlannedRun, config: DictConfig, job_type: str | None = None) -> list[str]:
    """Return the overrides of a run, one group in W&B with the others of its method.

    Args:
        run: Of a plan.
        config: What its method composes to.
        job_type: "tune" where W&B shall leave it out of the comparison.
    """
    # The order is that of the runs there are: another one would run them again.
    return [*run.overrides, *reversed(group_in_wandb(config, run.method, job_type))]


def _judge(outcome: Outcome) -> tuple[float | None, str]:
    """Return the primary metric on validation, or why there is none."""
    name = primary_of(outcome.result).name
    value = metric_of(outcome.result, name)
    if outcome.error or value is None:
        return None, outcome.error or f"its result has no {name}"
    return value, ""


def _best(runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> PlannedRun:
    """Return the best run; the first one where all failed, so that the failure is on record."""
    found = []
    for run in runs:
        outcome = outcomes[run.name]
        value, _ = _judge(outcome)
        if value is not None:
            found.append((primary_of(outcome.result).sign * value, run))
    return max(found, key=lambda pair: pair[0])[1] if found else runs[0]


def doubts(
    chosen: PlannedRun, tried: Sequence[PlannedRun], results: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return why a choice may be none: nothing was learnt, or the list should be longer.

    Chance level: of classes, the accuracy p on n validation samples is at most
    c + max(3 sqrt(c (1 - c) / n), (p_best - c) / 10), where c is the accuracy of naming the most
    frequent class and p_best that of the best run of all.
    """
    if chosen.name not in results:
        return []
    found, values = [], sorted(run.value for run in tried if run.value is not None)
    if _is_at_chance(results[chosen.name], results.values()):
        found.append("chance level")
    if len(values) > 1 and chosen.value in (values[0], values[-1]):
        found.append("edge of the list")
    return found


def _is_at_chance(result: Mapping[str, Any], results: Collection[Mapping[str, Any]]) -> bool:
    chance = result.get("chance")
    if chance is None or primary_of(result) != ACCURACY:  # results of before have no chance
        return False
    accuracy = result["metrics"][ACCURACY.name]
    top = max(other["metrics"].get(ACCURACY.name, 0.0) for other in results)
    noise = _ERRORS * sqrt(chance * (1 - chance) / result["samples"]["val"])
    return accuracy <= chance + max(noise, _HARDLY * (top - chance))


def _table(
    budget_key: str,
    tried: Sequence[Sequence[PlannedRun]],
    notes: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Outcome],
) -> str:
    """Write a row for each run; those that were chosen are the ones with notes, if empty ones."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    results = [outcome.result for outcome in outcomes.values()]
    metric = next((primary_of(r).name for r in results if r.get("primary")), ACCURACY.name)
    writer.writerow(["method", budget_key, "value", metric, "chosen", "note", "error"])
    for run in (run for runs in tried for run in runs):
        value, error = _judge(outcomes[run.name])
        shown = "" if value is None else f"{value:.4f}"
        chosen, note = "yes" if run.name in notes else "", "; ".join(notes.get(run.name, ()))
        row = [run.method, number_text(run.budget), number_text(run.value)]
        writer.writerow([*row, shown, chosen, note, error])
    return text.getvalue()


def _conclude(progress: Progress, num_packed: int, plan: Plan, out: Path, program: Path) -> int:
    num_failed = len(progress.failed)
    if num_failed == progress.num_runs:
        raise InputError(f"all runs failed, the last: {progress.failed[-1]}")
    num_completed = progress.num_runs - num_failed
    print(f"{num_completed} runs completed, {num_failed} failed, {num_packed} packed files")
    if progress.others:
        others = ", ".join(progress.others)
        print(f"not of this plan, kept in {out / OTHERS}: {others}", file=sys.stderr)
    if plan.choose is not None and progress.doubtful:
        groups = ", ".join(progress.doubtful)
        print(f"choose.values should have more of {plan.choose.key} for: {groups}")
    script = program.with_name("scripts") / "report.py"
    print(shlex.join(["python", str(script), str(out / RUNS), "--out", str(out / "report")]))
    return 0


def compose_methods(plan: Plan, conf: Path) -> dict[str, DictConfig]:
    """Compose one run of each method: name -> configuration.

    Raises:
        InputError: An override is unknown.
    """
    composed = {}
    value = None if plan.choose is None else plan.choose.values[0]
    for method, place in plan.groups:
        if method in composed:
            continue
        (run, *_) = plan.compared_runs(method, place, value)
        try:
            composed[method] = compose_run(conf, run.overrides)
        except InputError as error:
            raise InputError(f"{_place_of(str(error), plan, conf, method)}: {error}") from error
    return composed


def _place_of(mistake: str, plan: Plan, conf: Path, method: str) -> str:
    """Return the entry of the plan in which a mistake of a method's run stands."""
    common = {"overrides": plan.overrides}
    if plan.choose is not None:
        own = f"{plan.choose.key}={number_text(plan.choose.values[0])}"
        common["choose.key"] = [*plan.overrides, own]
    for place, overrides in common.items():
        try:
            compose_run(conf, overrides)
        except InputError as error:
            if str(error) == mistake:
                return place
    return f"methods.{method}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Compare methods by a plan: choices on validation, then runs with all seeds.",
        "The same command goes on after an interruption.",
    )
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="such as comparisons/fashion_mnist/5kB.yaml")
    add("--out", type=Path, required=True, metavar="DIR", help="where the run folders are kept")
    add_jobs(parser)
    return parser
