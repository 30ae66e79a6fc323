"""The command line of `scripts/benchmark.py`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from memfold.benchmarking.case_process import Measurement, launch, run_group
from memfold.benchmarking.cases import (
    CONSTRUCTIONS,
    DTYPES,
    OPTIMIZERS,
    Case,
    parse_strategies,
    with_dense,
)
from memfold.benchmarking.plots import draw
from memfold.benchmarking.presets import PRESETS
from memfold.benchmarking.results import Entry, describe_machine, read_results, summarise
from memfold.benchmarking.tables import print_tables, to_markdown
from memfold.benchmarking.workloads import WORKLOADS, workload
from memfold.errors import InputError
from memfold.files import write_text_atomically
from memfold.strategies import strategy_class, strategy_names

__all__ = ["main"]

_RESULTS = "results.json"
_RUN_AND_DRAW = Path()

_SELECTION = {
    "models": "mlp50m,resnet20",
    "strategies": "stable_rps",
    "ratios": "0.1,0.01",
    "dtypes": "float32",
    "compiled": "eager",
    "construction": "dense",
    "optimizer": "sgd",
    "batch_size": None,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or list or draw; return the exit status.

    0: all cases were measured; 1: at least one failed; 2: wrong arguments; 130: interrupted.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        if options.plot not in (None, _RUN_AND_DRAW):
            return _draw(options.plot, console)
        cases, rounds = _choose(options)
        if options.list:
            _list(cases, console)
            return 0
        return _run(cases, rounds, options, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; groups that were done are written", file=sys.stderr)
        return 130  # 128 + SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time and memory of training and inference, relative to the dense model.",
        epilog="Without a preset, all combinations of the lists are measured.",
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), help="a named list of cases; see --list")
    add("--models", help=f"comma list (default {_SELECTION['models']}), or which of the preset's")
    add("--strategies", help="comma list of name[:key=value[+key=value...]] (default stable_rps)")
    add("--ratios", help=f"comma list (default {_SELECTION['ratios']})")
    add("--dtypes", help=f"comma list of {', '.join(DTYPES)} (default float32)")
    add("--compiled", help="comma list of eager, compiled (default eager)")
    add("--construction", help="comma list of dense, meta (default dense)")
    add("--optimizer", help=f"comma list of {', '.join(OPTIMIZERS)} (default sgd, momentum 0.9)")
    add("--batch-size", type=_positive, help="default: the usual one of each model")
    add("--steps", type=_positive, help="timed training steps a process (default 10)")
    add("--warmup", type=_positive, help="training steps before them (default 3)")
    add("--rounds", type=_positive, help="processes a case, interleaved (default 3)")
    add("--threads", type=_positive, default=torch.get_num_threads())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="folder (default outputs/benchmark/TIME)")
    add(
        "--plot",
        type=Path,
        nargs="?",
        const=_RUN_AND_DRAW,
        metavar="RESULTS_JSON",
        help="draw after the run; with a results.json, only draw that, next to it",
    )
    add("--list", action="store_true", help="list what there is and what would run, and stop")
    return parser


def _choose(options: argparse.Namespace) -> tuple[list[Case], int]:
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise InputError(f"--device {options.device}: unknown; cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {options.device}: there is no CUDA device")
    if options.preset is None:
        cases, rounds = _combinations(options), 3
    else:
        cases, rounds = _of_preset(options), PRESETS[options.preset].rounds
    given = {key: getattr(options, key) for key in ("steps", "warmup")}
    given = {key: value for key, value in given.items() if value is not None}
    return [replace(case, **given) for case in cases], options.rounds or rounds


def _of_preset(options: argparse.Namespace) -> list[Case]:
    for key in _SELECTION:
        if key != "models" and getattr(options, key) is not None:
            flag = key.replace("_", "-")
            raise InputError(f"--{flag} and --preset {options.preset}: give one of them")
    cases = PRESETS[options.preset].cases(options.device, options.threads)
    if options.models is None:
        return cases
    there = tuple(dict.fromkeys(case.model for case in cases))
    models = _words("models", options.models, there)
    return [case for case in cases if case.model in models]


def _combinations(options: argparse.Namespace) -> list[Case]:
    chosen = {
        key: default if getattr(options, key) is None else getattr(options, key)
        for key, default in _SELECTION.items()
    }
    models = _words("models", chosen["models"], tuple(WORKLOADS))
    specs = parse_strategies(chosen["strategies"])
    if not specs:
        raise InputError("--strategies: name at least one strategy")
    return [
        Case(
            model=model,
            strategy=spec.name,
            ratio=None if strategy_class(spec.name).ratios == "one" else ratio,
            options=spec.options,
            construction="dense" if spec.name == "dense" else construction,
            dtype=dtype,
            compiled=compiled == "compiled",
            optimizer=optimizer,
            batch_size=chosen["batch_size"] or workload(model).batch_size,
            device=options.device,
            threads=options.threads,
        )
        for model in models
        for optimizer in _words("optimizer", chosen["optimizer"], OPTIMIZERS)
        for dtype in _words("dtypes", chosen["dtypes"], DTYPES)
        for compiled in _words("compiled", chosen["compiled"], ("eager", "compiled"))
        for spec in specs
        for ratio in _ratios(chosen["ratios"])
        for construction in _words("construction", chosen["construction"], CONSTRUCTIONS)
    ]


def _run(cases: Sequence[Case], rounds: int, options: argparse.Namespace, console: Console) -> int:
    started = datetime.now().astimezone()
    folder = options.out or Path("outputs/benchmark") / started.strftime("%Y-%m-%d_%H-%M-%S")
    if (folder / _RESULTS).exists():
        raise InputError(f"--out {folder}: has a {_RESULTS} already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror})") from error
    results: dict[str, Any] = {
        "status": "running",
        "command": shlex.join(["python", *sys.argv]),
        "started": started.isoformat(timespec="seconds"),
        "rounds": rounds,
        "environment": describe_machine(options.device, options.threads),
        "cases": [],
    }

    def report(case: Case, number: int, found: Measurement) -> None:
        what = found.get("error") or f"{1000 * found['step_seconds']:.4g} ms a step"
        line = f"{case.group}: {case.name}, round {number + 1} of {rounds}: {what}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for group in with_dense(cases).values():
        found = run_group(group, rounds, run=launch, report=report)
        for case, measurements in zip(group, found, strict=True):
            results["cases"].append(summarise(case, measurements, found[0]))
        _write(results, folder)  # an interrupted benchmark keeps the groups that are done
    results["status"] = "completed"
    _write(results, folder)
    print_tables(results, console)
    if options.plot is not None:
        draw(results, folder)
    console.print(f"results: {folder}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(_failed(entry) for entry in results["cases"]) else 0


def _write(results: dict[str, Any], folder: Path) -> None:
    write_text_atomically(folder / _RESULTS, json.dumps(results, indent=1) + "\n")
    write_text_atomically(folder / "table.md", to_markdown(results))


def _failed(entry: Entry) -> bool:
    return entry["status"] == "failed"


def _draw(file: Path, console: Console) -> int:
    files = draw(read_results(file), file.parent)
    if not files:
        raise InputError(f"{file}: no case was completed; there is nothing to draw")
    for path in files:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return 0


def _list(cases: Sequence[Case], console: Console) -> None:
    lines = [f"model {name}: {source.summary}" for name, source in WORKLOADS.items()]
    lines += [f"preset {name}: {preset.summary}" for name, preset in PRESETS.items()]
    lines += [f"strategies: {', '.join(strategy_names())}", f"dtypes: {', '.join(DTYPES)}"]
    for group, members in with_dense(cases).items():
        lines += [f"would run: {group}", *(f"    {case.name}" for case in members)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _words(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in allowed:
            raise InputError(f"--{flag} {word}: unknown; allowed: {', '.join(allowed)}")
    if not words:
        raise InputError(f"--{flag}: name at least one of {', '.join(allowed)}")
    return words


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise InputError(f"--ratios {text}: must be numbers in (0, 1], separated by commas")
    return ratios


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)
