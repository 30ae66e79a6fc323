"""Slots of this machine in which runs go on at the same time, and the signals that end them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["StopSignal", "Stopped", "share_out", "work_in_parallel"]

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
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
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


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
