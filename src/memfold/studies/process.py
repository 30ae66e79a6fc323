"""One program in a process tree of its own: started, watched, stopped, and why it failed.

A process of its own gives each run clean variables, memory statistics and loggers. Lightning's DDP
launcher starts the program again with the same arguments: in a sweep it would replay all of it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from memfold.files import writing
from memfold.processes.ranks import LAUNCHER_VARIABLES, declare_parent
from memfold.runs.result import UNFINISHED

__all__ = [
    "SECONDS_TO_STOP",
    "StopSignal",
    "Stopped",
    "is_one_of_several_tasks",
    "job_environment",
    "reason",
    "run_program",
]

SECONDS_TO_STOP = {signal.SIGINT: 30.0, signal.SIGTERM: 130.0}
"""Until a run is killed. After SIGTERM it saves a checkpoint, for which it gives itself 120 s."""
_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_TO_FOLLOW = 5.0
_SECONDS_OF_ONE_REQUEST = 2.0
"""A process group and its members may be signalled both; only what comes later is impatience."""
_OF_A_CLUSTER = ("SLURM_", "SUBMITIT_")


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


def run_program(
    arguments: Sequence[str],
    output: Path | None = None,
    variables: Mapping[str, str] | None = None,
    wanted_stop: Callable[[], signal.Signals | None] = lambda: None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Run `python ARGUMENTS` to its end; it ends with this process, too, however that goes.

    Args:
        arguments: The program and its arguments.
        output: A file that gets what it prints, after what is there; `None`: as this process.
        variables: Of the environment, besides those of this process; see `job_environment`.
        wanted_stop: Asked again and again; returns a signal once the program shall get it and end,
            SIGKILL when nothing is waited for any more.
        watch: Called again and again; what it raises ends the program.

    Returns:
        The exit status (negative: the signal that killed it), and what was printed to `output`.

    Raises:
        InputError: `output` cannot be written.
    """
    file: Any = nullcontext()
    if output is not None:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            file = output.open("ab")
    with file as opened:
        start = 0 if opened is None else opened.tell()
        process = _start(arguments, opened, variables or {})
        number = None
        try:
            while number is None and _wait(process, _SECONDS_BETWEEN_LOOKS) is None:
                number = wanted_stop()
                watch()
            if number is not None:
                _stop(process, number, wanted_stop)
        except BaseException as error:  # Ctrl-C that nobody notes, a trial that is given up
            is_interrupt = isinstance(error, KeyboardInterrupt)
            number = wanted_stop() or (signal.SIGINT if is_interrupt else signal.SIGTERM)
            _stop(process, number, wanted_stop)
            raise
        finally:
            if process.returncode != 0:
                _end_followers(process)
    printed = "" if output is None else output.read_bytes()[start:].decode(errors="replace")
    return process.returncode, printed


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a program that trains.

    A SLURM job of several tasks is one run over all of them: Lightning finds its ranks in SLURM's
    variables. In any other case they would be taken for that by mistake, and so would those which
    Lightning's launcher has left behind.

    Args:
        environment: The variables of this process.
    """
    if is_one_of_several_tasks(environment):
        kept = dict(environment)
    else:
        kept = {
            name: value
            for name, value in environment.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith(_OF_A_CLUSTER)
        }
    declare_parent(kept)
    return kept


def is_one_of_several_tasks(environment: Mapping[str, str]) -> bool:
    """Tell whether submitit has started this process as one rank of a run."""
    is_submitted = environment.get("SUBMITIT_EXECUTOR") == "slurm"
    return is_submitted and int(environment.get("SLURM_NTASKS") or "1") > 1


def reason(
    status: int, printed: str, result: Mapping[str, Any], stop: signal.Signals | None = None
) -> str:
    """Say in one line why a run has no result.

    Args:
        status: Its exit status.
        printed: What it has printed.
        result: Contents of its `result.json`.
        stop: The signal that it got to stop, if any.
    """
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    error = result.get("error")
    if error and error != UNFINISHED:
        return str(error)
    # A library may make an exception of its own of Ctrl-C while it is imported.
    how = f"ended with status {status} before it could say why"
    return f"its process {f'was stopped by {stop.name}' if stop else how}"


def _start(
    arguments: Sequence[str], output: IO[bytes] | None, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # A session of its own, so that the terminal's Ctrl-C reaches the program once, through us, and
    # `_stop` gets its children, too.
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**job_environment(os.environ), **variables},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _stop(
    process: subprocess.Popen[bytes],
    number: signal.Signals,
    wanted_stop: Callable[[], signal.Signals | None],
) -> None:
    """Send a signal; kill what does not end, at an exception, or when that is wanted by now."""
    try:
        _signal_group(process, number)
        deadline = time.monotonic() + SECONDS_TO_STOP.get(number, 0.0)
        while time.monotonic() < deadline and wanted_stop() != signal.SIGKILL:
            if _wait(process, _SECONDS_BETWEEN_LOOKS) is not None:
                return
    finally:
        if process.returncode is None:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _end_followers(process: subprocess.Popen[bytes]) -> None:
    """The first process of a tree has not come to its end: the next run is to find no others."""
    deadline = time.monotonic() + _SECONDS_TO_FOLLOW
    while _signal_group(process, None) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals | None) -> bool:
    """Send a signal, or none, to what is left of a tree; tell whether anything is."""
    try:
        os.killpg(process.pid, number or 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
