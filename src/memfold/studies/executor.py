"""Slots of this machine in which runs go on at the same time, and the signals that end them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.runs.locks import try_lock

__all__ = [
    "StopSignal",
    "Stopped",
    "device_slot",
    "name_visible_devices",
    "num_parallel_jobs",
    "share_out",
    "work_in_parallel",
]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS_BETWEEN_LOOKS = 0.5


class Stopped(Exception):
    """The user, or the machine, wants all runs to stop."""


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

        before = {
            one: signal.signal(one, note)
            for one in (signal.SIGINT, signal.SIGTERM)
            # A shell that starts a program in the background lets it ignore Ctrl-C.
            if signal.getsignal(one) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def wanted(self) -> signal.Signals | None:
        """Return what a run shall get: SIGTERM, after which it saves a checkpoint."""
        return signal.SIGTERM if self.event.is_set() else None


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


def num_parallel_jobs(launcher: Mapping[str, Any]) -> int:
    """Return how many jobs joblib runs at once; 1 with every other launcher.

    Raises:
        InputError: It is none at all.
    """
    n_jobs = launcher.get("n_jobs")
    if n_jobs is None:
        return 1
    if n_jobs == 0:
        raise InputError("hydra.launcher.n_jobs=0: 1 or more jobs at once, or -1 for one per core")
    from joblib import effective_n_jobs

    return effective_n_jobs(int(n_jobs))


def name_visible_devices(config: DictConfig) -> None:
    """Set `CUDA_VISIBLE_DEVICES` to all GPUs, for the workers of joblib that will share them out.

    What the user has set stays. Without a GPU, or with one job at a time, nothing is set.
    """
    if num_parallel_jobs(config.hydra.launcher) > 1 and not _is_on_cpu(config):
        devices = _visible_gpus(os.environ)
        if len(devices) > 1:
            os.environ.setdefault(_VISIBLE, ",".join(devices))


@contextmanager
def device_slot(sweep: Path, cfg: DictConfig, num_jobs: int) -> Iterator[str | None]:
    """Reserve the GPU with the fewest jobs for a job that wants one, as long as the block runs.

    Args:
        sweep: The sweep's folder, where the kernel keeps the locks of this machine's processes.
        cfg: The job's configuration.
        num_jobs: How many jobs run at once.

    Returns:
        What `CUDA_VISIBLE_DEVICES` shall be; `None` to leave it as it is.

    Raises:
        InputError: The folder cannot be written.
    """
    devices = _visible_gpus(os.environ) if _VISIBLE in os.environ else []
    wants_one = str(OmegaConf.select(cfg, "trainer.devices")) == "1" and not _is_on_cpu(cfg)
    if num_jobs == 1 or len(devices) < 2 or not wants_one:
        yield None
        return
    # A second job comes to a GPU when each has one.
    rounds = range(-(-num_jobs // len(devices)))
    slots = [(place, f"{place}_{turn}") for turn in rounds for place in range(len(devices))]
    while True:
        for place, name in slots:
            with try_lock(sweep / ".sweep" / "devices" / name) as is_free:
                if is_free:
                    yield devices[place]
                    return
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # a job that was killed has just left its slot


def _is_on_cpu(config: DictConfig) -> bool:
    return OmegaConf.select(config, "trainer.accelerator") == "cpu"


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    named = environment.get(_VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
