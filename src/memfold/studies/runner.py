"""Planned runs, each completed once: found, resumed, replaced, or run from the start."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.files import read_json, write_text_atomically, writing
from memfold.overrides import quote_value
from memfold.runs.folder import LOCK, OUTPUT, OVERRIDES, can_be_resumed, is_completed, read_result
from memfold.runs.recorded import read_overrides
from memfold.studies.process import Stopped, StopSignal, reason, run_program
from memfold.studies.put_aside import put_aside, wait_for_orphan

__all__ = [
    "Outcome",
    "RunFailed",
    "Runner",
    "fit_seconds",
    "metric_of",
    "run_all",
    "runners",
    "share_out",
    "share_work",
    "variables_for",
]

_T = TypeVar("_T")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# How a run says that it cannot be resumed whatever the user does; another model or another
# configuration is no such reason.
_DAMAGED = re.compile(
    r"^error: resume(: .*(damaged or no checkpoint|is no checkpoint|pickled Python objects)"
    r"|=.* cannot be read)",
    re.MULTILINE,
)


class RunFailed(Exception):
    """The run ended without a result; the message is the reason, in one line."""


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended."""

    result: Mapping[str, Any]
    """Contents of `result.json`; empty when it failed."""
    error: str
    """Why it failed, in one line; empty when it is completed."""
    seconds: float


def metric_of(result: Mapping[str, Any], name: str) -> float | None:
    """Return a metric of a result; `None` where that has none, or no number."""
    metrics = result.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return value if isinstance(value, int | float) else None


def fit_seconds(result: Mapping[str, Any]) -> float:
    """Return how long a run trained."""
    return (result.get("time") or {}).get("fit_seconds") or 0.0


@dataclass(frozen=True)
class Runner:
    """Runs one after the other, in one of the slots of this machine."""

    program: Path
    """`train.py`."""
    stop: StopSignal = field(default_factory=StopSignal)
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the runs get besides those of this process."""

    def run(
        self, overrides: Sequence[str], folder: Path, watch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return the result of the completed run in `folder`, after as much training as it needs.

        A run that was started with other overrides answers another question: it is put aside.

        Args:
            overrides: Of `train.py`, without the folder.
            folder: The run folder. What the run prints goes into `folder` + `.txt`, the
                overrides into `folder` + `.overrides.json`.
            watch: Called again and again; what it raises stops the run.

        Raises:
            RunFailed: The run failed.
            Stopped: `stop` was set.
            InputError: The folder cannot be written.
        """
        is_same = _read_overrides(folder) == list(overrides)
        if not (is_same and is_completed(folder)):
            wait_for_orphan(folder, self.stop.event)
        has_saved = is_completed(folder) or can_be_resumed(folder)
        if has_saved and not is_same:
            put_aside(folder)
        if not (has_saved and is_same):
            with writing(folder):
                if folder.exists():
                    shutil.rmtree(folder)
            write_text_atomically(_beside(folder, OVERRIDES), json.dumps(list(overrides)) + "\n")
        if not is_completed(folder):
            place = f"hydra.run.dir={quote_value(str(folder))}"
            arguments = [str(self.program), *overrides, place]
            status, printed = self.go_on(arguments, folder, _beside(folder, OUTPUT), watch)
            if self.stop.event.is_set():
                raise Stopped
            if status != 0 or not is_completed(folder):
                raise RunFailed(reason(status, printed, read_result(folder)))
        watch()
        return read_result(folder)

    def go_on(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        watch: Callable[[], None] = lambda: None,
        *,
        may_replace: bool = True,
    ) -> tuple[int, str]:
        """Resume the run in `folder` where it has a checkpoint, or start it.

        What an unfinished run has left is removed if its checkpoint is damaged.

        Args:
            arguments: Those with which `python` starts the run in that folder.
            folder: Of a run that is not completed and was started so, or of none.
            output: Gets what the run prints.
            watch: Called again and again; what it raises stops the run.
            may_replace: Whether this process may remove what is damaged.

        Returns:
            The exit status and what was printed, as `run_program`.

        Raises:
            Stopped: `stop` was set before a start.
            InputError: A file cannot be written.
        """

        def start(*more: str) -> tuple[int, str]:
            if self.stop.wanted() is not None:
                raise Stopped
            given = [*arguments, *more]
            return run_program(given, output, self.variables, self.stop.wanted, watch)

        if can_be_resumed(folder):
            status, printed = start(f"resume={quote_value(str(folder))}")
            if status <= 0 or not may_replace or _DAMAGED.search(printed) is None:
                return status, printed
            _remove_run(folder)
        return start()


def runners(program: Path, num_slots: int, stop: StopSignal) -> list[Runner]:
    """Return a runner for each slot of this machine, which shares out its cores and GPUs."""
    return [Runner(program, stop, variables) for variables in share_out(num_slots, os.environ)]


def share_out(num_slots: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Divide the cores and the GPUs of this machine.

    Args:
        num_slots: At least 1; one alone gets everything.
        environment: Of this process. What it sets for threads stays.

    Returns:
        The variables for the runs of each slot.
    """
    if num_slots == 1:
        return [{}]
    devices = _visible_gpus(environment)
    made = []
    for index in range(num_slots):
        variables = {}
        if "OMP_NUM_THREADS" not in environment:
            num_cores = len(os.sched_getaffinity(0))
            variables["OMP_NUM_THREADS"] = str(max(1, num_cores // num_slots))
        if len(devices) > 1:
            own = devices[index::num_slots] or [devices[index % len(devices)]]
            variables[_VISIBLE] = ",".join(own)
        made.append(variables)
    return made


def variables_for(run: DictConfig, slot: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a slot for one run, which sees all GPUs if it needs more than that.

    Args:
        run: Its configuration.
        slot: Of `share_out`.
    """
    devices = OmegaConf.select(run, "trainer.devices")
    num_own = len(slot.get(_VISIBLE, "").split(","))
    is_on_cpu = OmegaConf.select(run, "trainer.accelerator") == "cpu"
    is_enough = str(devices).isdecimal() and int(devices) <= num_own and not is_on_cpu
    return {name: value for name, value in slot.items() if is_enough or name != _VISIBLE}


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    named = environment.get(_VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def run_all(
    runs: Iterable[tuple[str, Sequence[str]]],
    folder: Path,
    workers: Sequence[Runner],
    report: Callable[[str, Outcome], None],
) -> dict[str, Outcome]:
    """Run what is missing, in the order given; a run that fails leaves the others alone.

    Args:
        runs: Names of run folders, and overrides.
        folder: In which those are.
        workers: One for each run at a time.
        report: Told of each run as it ends, of one at a time.

    Returns:
        How each ended, by name.

    Raises:
        Stopped: The user, or the machine, wants all runs to stop.
        InputError: The folder cannot be written.
    """
    outcomes: dict[str, Outcome] = {}
    one_by_one = threading.Lock()

    def run(worker: Runner, planned: tuple[str, Sequence[str]]) -> None:
        name, overrides = planned
        start = time.monotonic()
        result, error = {}, ""
        try:
            result = worker.run(overrides, folder / name)
        except RunFailed as failure:
            error = str(failure)
        with one_by_one:
            outcomes[name] = Outcome(result, error, time.monotonic() - start)
            report(name, outcomes[name])

    share_work(runs, workers, run)
    return outcomes


def share_work(
    items: Iterable[_T], workers: Sequence[Runner], do: Callable[[Runner, _T], None]
) -> None:
    """Let each worker take what comes next, again and again, until nothing is left.

    Args:
        items: Asked for the next one by one worker at a time.
        workers: With a common signal to stop.
        do: Called in the thread of a worker.

    Raises:
        Stopped: The user, or the machine, wants all runs to stop.
        Exception: What `items` or `do` has raised; the other workers are stopped then.
    """
    waiting, one_by_one = iter(items), threading.Lock()
    stop = workers[0].stop.event

    def work(worker: Runner) -> None:
        while not stop.is_set():
            with one_by_one:
                item = next(waiting, None)
            if item is None:
                return
            with suppress(Stopped):
                do(worker, item)

    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            for done in as_completed([threads.submit(work, worker) for worker in workers]):
                done.result()
        except BaseException:
            stop.set()
            raise
    if stop.is_set():
        raise Stopped


def _remove_run(folder: Path) -> None:
    """Remove what an unfinished run has left, but for what it printed."""
    for path in folder.iterdir():
        if path.name != LOCK and path.suffix != ".log":
            with writing(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _read_overrides(folder: Path) -> object:
    """Return what the run in `folder` was started with; `None` where nothing says so."""
    try:
        return read_json(_beside(folder, OVERRIDES))
    except FileNotFoundError:  # a run of somebody else
        with suppress(InputError):
            return [o.input_line for o in read_overrides(folder) if o.key_or_group != "resume"]
    except (OSError, ValueError):
        pass
    return None
