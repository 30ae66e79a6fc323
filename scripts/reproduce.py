#!/usr/bin/env python
"""The comparison of the STABLE-RPS paper: every experiment, method, ratio and seed, and a report.

python scripts/reproduce.py --out outputs/paper --dry-run
python scripts/reproduce.py --out outputs/paper --experiments cifar10_vgg11 --jobs-per-device 4 \
    -- data.root=/data trainer.precision=bf16-mixed

The same command goes on with what was interrupted or has failed; docs/reproduction.md has the rest.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from memfold.errors import InputError
from memfold.file_models import check
from memfold.overrides import folder_override
from memfold.runs.folder import OTHERS, RUNS
from memfold.studies.arguments import (
    command_parser,
    ending_in_one_line,
    positive_integer,
    split_overrides,
    working_in,
)
from memfold.studies.choose import compose_methods, in_group, run_plan
from memfold.studies.choose_plan import Plan
from memfold.studies.composing import prepare_data
from memfold.studies.process import Stopped, StopSignal, run_program
from memfold.studies.runner import runners

EXPERIMENTS = (
    "cifar10_resnet20",
    "cifar10_vgg11",
    "cifar100_resnet20",
    "cifar100_vgg11",
    "tiny_imagenet_resnet18",
)
"""Those of `conf/experiment` that take `protocol/open_lth`."""
# The paper's, but for ltr, one run of which is up to 27 trainings at these ratios.
METHODS = ("dense", "stable_rps", "roast", "rand", "mag", "snip", "grasp", "synflow", "small")
RATIOS = (0.316, 0.1, 0.0316, 0.01, 0.00316)
SEEDS = (1, 2, 3)
NUM_EPOCHS = 160
"""Of `conf/experiment/protocol/open_lth.yaml`."""
INSTEAD = {
    "experiment": "--experiments",
    "compression": "--methods",
    "trainer.max_epochs": "--epochs",
}
"""Keys of `train.py` that options decide."""


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
    options = parser().parse_args(own)
    out: Path = options.out
    again = shlex.join(["python", sys.argv[0], *arguments])

    def body(stop: StopSignal) -> int:
        plans = {name: plan_of(name, options, overrides) for name in options.experiments}
        methods = {name: compose_methods(plan, root / "conf") for name, plan in plans.items()}
        program = Path(os.path.relpath(root / "train.py"))
        report = report_command(root, plans, out, schedule(options.epochs))
        runs = list(commands(program, plans, methods, out))
        if options.dry_run:
            for command in [*runs, report]:
                print(shlex.join(["python", *command]))
            return 0
        prepare_data(run for own in methods.values() for run in own.values())
        num_slots = options.jobs_per_device * num_devices(overrides)
        how = f"{num_slots} at once, {schedule(options.epochs)} each"
        print(f"runs: {len(runs)}, {how}", flush=True)
        failed = []
        with working_in(out, stop):
            for name, plan in plans.items():
                print(f"\n{out / name}", flush=True)
                workers = runners(program, num_slots, stop)
                progress = run_plan(plan, methods[name], out / name, workers)
                failed += [f"{name}/{line}" for line in progress.failed]
                if progress.others:
                    others = ", ".join(progress.others)
                    print(f"not of this grid, kept in {out / name / OTHERS}: {others}")
            print(f"\n$ {shlex.join(['python', *report])}", flush=True)
            status, _ = run_program(report, wanted_stop=stop.wanted)
            if stop.event.is_set():
                raise Stopped
        if failed:
            line = f"error: {len(failed)} runs failed, the last: {failed[-1]}; go on with: {again}"
            print(line, file=sys.stderr)
        return int(bool(failed) or status != 0)

    return ending_in_one_line(body, f"error: stopped; go on with: {again}")


def plan_of(experiment: str, options: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    """Return the runs of one experiment: nothing is chosen.

    Raises:
        InputError: A value is out of range or given twice, or an override is decided by an option.
    """
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key in INSTEAD:
            raise InputError(f"{text}: use {INSTEAD[key]} instead")
    given = [f"experiment={experiment}"]
    if options.epochs != NUM_EPOCHS:
        # Milestones that are not given lie at 50 % and 75 %, as 80 and 120 do in 160.
        given += [f"trainer.max_epochs={options.epochs}", "scheduler.milestones=null"]
    if not any(text.startswith("logger=") for text in overrides):
        given.append("logger=csv")
    content = {
        "overrides": [*given, *overrides],
        "methods": {name: [f"compression={name}"] for name in options.methods},
        "ratios": options.ratios,
        "seeds": options.seeds,
        "bits": [],
    }
    return check(Plan, content)


def commands(
    program: Path,
    plans: Mapping[str, Plan],
    methods: Mapping[str, Mapping[str, DictConfig]],
    out: Path,
) -> Iterable[list[str]]:
    """List what every run could be started with by hand."""
    for name, plan in plans.items():
        for group in plan.groups:
            for run in plan.compared_runs(*group, None):
                place = folder_override("hydra.run.dir", out / name / RUNS / run.name)
                yield [str(program), *in_group(run, methods[name][run.method]), place]


def schedule(num_epochs: int) -> str:
    """Say how long a run trains, and that it is shorter than the protocol where it is."""
    if num_epochs == NUM_EPOCHS:
        return f"{NUM_EPOCHS} epochs"
    drops = f"drops after {num_epochs / 2:g} and {num_epochs * 3 / 4:g}"
    epochs = "1 epoch" if num_epochs == 1 else f"{num_epochs} epochs"
    return f"{epochs} instead of {NUM_EPOCHS} ({drops})"


def num_devices(overrides: Sequence[str]) -> int:
    """Return how many GPUs there are; 1 where the CPU trains."""
    if "trainer=cpu" in overrides:
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def report_command(root: Path, names: Iterable[str], out: Path, title: str) -> list[str]:
    """Return the program that reports, and its arguments."""
    # The experiments that earlier calls have run are drawn, too.
    earlier = (name for name in EXPERIMENTS if (out / name / RUNS).is_dir())
    drawn = list(dict.fromkeys([*names, *earlier]))
    published = root / "results" / "published"
    references = [file for name in drawn for file in sorted(published.glob(f"*_{name}.csv"))]
    return [
        os.path.relpath(root / "scripts" / "report.py"),
        *(str(out / name / RUNS) for name in drawn),
        f"--out={out / 'report'}",
        *(f"--reference={os.path.relpath(file)}" for file in references),
        f"--title=The STABLE-RPS paper's comparison, {title}",
    ]


def names(text: str) -> list[str]:
    """Read names that commas separate."""
    return [part.strip() for part in text.split(",")]


def numbers(text: str) -> list[float]:
    """Read numbers that commas separate."""
    return [float(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """Read whole numbers that commas separate."""
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """Return the parser of what stands before `--`."""
    made = command_parser(
        "Run the comparison of the STABLE-RPS paper and report on it.",
        (__doc__ or "").partition("\n\n")[2],
        "%(prog)s --out DIR [options] -- [overrides of train.py]",
    )
    add = made.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where all of it is kept")
    for option, kind, values, what in (
        ("--experiments", names, EXPERIMENTS, "of conf/experiment"),
        ("--methods", names, METHODS, "strategies"),
        ("--ratios", numbers, RATIOS, "of all methods but dense"),
        ("--seeds", whole_numbers, SEEDS, "of every cell"),
    ):
        text = f"{what} (default {','.join(map(str, values))})"
        add(option, type=kind, default=list(values), metavar="A,B", help=text)
    add(
        "--jobs-per-device",
        type=positive_integer,
        default=2,
        metavar="N",
        help="runs at a time on each GPU, or on the CPU where there is none (default 2)",
    )
    add(
        "--epochs",
        type=positive_integer,
        default=NUM_EPOCHS,
        metavar="N",
        help=f"fewer than the protocol's {NUM_EPOCHS}; the drops stay at 50 and 75 %%",
    )
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], root=Path(__file__).resolve().parents[1]))
