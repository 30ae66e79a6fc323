"""Workers that take trials from a study until it has enough, and the signals that end them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from memfold.tuning.configuration import Configuration
from memfold.tuning.run import Launcher, RunFailed, Stopped
from memfold.tuning.study import Study, Trial
from memfold.tuning.trial import Objective, TakenOver

__all__ = ["StopSignal", "launchers", "run_trials", "work_in_parallel"]

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class StopSignal:
    """Ctrl-C or SIGTERM, once it has come."""

    event: threading.Event = field(default_factory=threading.Event)
    number: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note the signals instead of dying of them. For the main thread."""

        def note(number: int, *_: object) -> None:
            self.number = number
            self.event.set()

        before = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def launchers(
    program: Path, num_workers: int, stop: threading.Event, environment: Mapping[str, str]
) -> list[Launcher]:
    """Divide the cores and the GPUs of this machine among the workers.

    Args:
        program: `train.py`.
        num_workers: At least 1; one alone gets everything.
        stop: Set when the runs shall stop.
        environment: Of this process. What it sets for threads stays.
    """
    devices = _visible_gpus(environment)
    made = []
    for index in range(num_workers):
        variables = {}
        if num_workers > 1 and "OMP_NUM_THREADS" not in environment:
            num_cores = len(os.sched_getaffinity(0))
            variables["OMP_NUM_THREADS"] = str(max(1, num_cores // num_workers))
        if num_workers > 1 and len(devices) > 1:
            own = devices[index::num_workers] or [devices[index % len(devices)]]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        made.append(Launcher(program, variables, stop))
    return made


def work_in_parallel(tasks: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run each task in a thread; when one fails, stop the others and raise what it raised."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a signal's handler runs between two waits
            thread.join(_SECONDS_BETWEEN_LOOKS)
    if errors:
        raise errors[0]


def run_trials(
    study: Study, configuration: Configuration, launcher: Launcher, num_trials: int
) -> None:
    """Run trials until the study has enough, or `launcher.stop` is set.

    Enough are `num_trials` that are completed or pruned, or as many that failed.
    """
    while not launcher.stop.is_set():
        with ExitStack() as claim:
            claim.enter_context(study.claimed())
            study.recover()
            states = [trial.state for trial in study.trials()]
            num_done = states.count("completed") + states.count("pruned")
            if num_done >= num_trials or states.count("failed") >= num_trials:
                return
            if num_done + states.count("running") < num_trials:
                _run_one(study, configuration, launcher, claim)
                continue
        launcher.stop.wait(_SECONDS_BETWEEN_LOOKS)  # a running one may fail


def _run_one(
    study: Study, configuration: Configuration, launcher: Launcher, claim: ExitStack
) -> None:
    study.seed_sampler()
    with ExitStack() as hold:
        objective = Objective(study, configuration, launcher, claim, hold)
        try:
            study.optuna.optimize(objective, n_trials=1, catch=(RunFailed, Stopped, TakenOver))
        except ValueError:
            if not objective.is_taken_over:  # Optuna refuses what it is told of such a trial
                raise
    if objective.number is not None and not objective.is_taken_over:
        print(_line(study.trials()[objective.number]), flush=True)


def _line(trial: Trial) -> str:
    setting = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in trial.setting.items()
    )
    outcome = {
        "completed": lambda: f"{trial.value:.4f}",
        "pruned": lambda: f"pruned after epoch {trial.num_epochs}",
        "failed": lambda: f"failed: {trial.reason}",
    }.get(trial.state, lambda: "interrupted, to be tried again")()
    return f"trial {trial.number}: {setting}: {outcome} ({trial.seconds:.0f} s)"


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
