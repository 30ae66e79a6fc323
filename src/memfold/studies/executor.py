"""Slots of this machine in which runs go on at the same time, and the signals that end them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

__all__ = ["StopSignal", "Stopped", "share_out", "variables_for", "work_in_parallel"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS_OF_ONE_REQUEST = 2.0
"""A process group and its members may be signalled both; only what comes later is impatience."""


class Stopped(Exception):
    """The user, or the machine, wants all runs to stop."""


@dataclass
class StopSignal:
    """Ctrl-C or SIGTERM, once it has come."""

    lets_save: bool = True
    """Whether runs get SIGTERM, after which they save a checkpoint, at Ctrl-C too."""
    event: threading.Event = field(default_factory=threading.Event)
    number: int | None = None
    is_urgent: bool = False
    """Whether the user has asked again: nothing is waited for."""
    since: float = 0.0
    """When it came, by `time.monotonic`."""

    def note(self, number: int, *_: object) -> None:
        """Handle a signal."""
        if self.number is None:
            self.number, self.since = number, time.monotonic()
            self.event.set()
        elif time.monotonic() - self.since > _SECONDS_OF_ONE_REQUEST:
            self.is_urgent = True

    @contextmanager
    def caught(self, handler: Callable[..., None] | None = None) -> Iterator[None]:
        """Call `handler`, by default `note`, instead of dying. For the main thread."""
        before = {
            one: signal.signal(one, handler or self.note)
            for one in (signal.SIGINT, signal.SIGTERM)
            # A shell that starts a program in the background lets it ignore Ctrl-C.
            if signal.getsignal(one) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for one, former in before.items():
                signal.signal(one, former)

    def wanted(self) -> signal.Signals | None:
        """Return what a run shall get, if anything."""
        if self.is_urgent:
            return signal.SIGKILL
        if not self.event.is_set():
            return None
        is_passed_on = self.number is not None and not self.lets_save
        return signal.Signals(self.number) if is_passed_on else signal.SIGTERM


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
    with ThreadPoolExecutor(len(tasks)) as threads:
        try:
            for done in as_completed([threads.submit(task) for task in tasks]):
                done.result()
        except BaseException:
            stop.set()
            raise


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
