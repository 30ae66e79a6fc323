"""Jobs that a launcher of Hydra's, such as submitit's, runs in processes of its own, its tasks.

They may be on other machines: a task and the sweep tell each other everything through files.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from omegaconf import DictConfig

from memfold.errors import InputError
from memfold.overrides import quote_value
from memfold.studies.executor import Stopped, StopSignal
from memfold.studies.process import SECONDS_TO_STOP
from memfold.studies.runner import Runner
from memfold.studies.sweep_folder import PLAN, Plan, read_notes, request_stop, requested_stop
from memfold.studies.sweep_job import SweepJob, objective_of

__all__ = ["TaskWatch", "run_sweep_job"]

_SECONDS_BETWEEN_LOOKS = 0.3


def run_sweep_job(cfg: DictConfig, script: Path) -> float:
    """Run one job in the process that its launcher calls for it.

    Args:
        cfg: The job's configuration.
        script: The program to start.

    Returns:
        The last primary metric; NaN when the job failed, so that the sweep goes on. A job that
        would repeat an earlier one has that of the earlier one, once it is there.

    Raises:
        InputError: The folder is another job's.
    """
    job = SweepJob.of(cfg, script)
    plan = Plan.find(job.sweep / PLAN)
    earlier = None if plan is None else plan.repeats.get(str(job.note.number))
    if earlier is not None:
        with suppress(OSError):  # Hydra has made it
            job.folder.rmdir()
        return objective_of(job.sweep, earlier)
    _leave_interrupts_to_the_sweep()
    with suppress(Stopped):
        job.bring_to_end(Runner(script, _Marks(job, plan)))
    return objective_of(job.sweep, job.note.number)


class TaskWatch:
    """Reports on the jobs of a launcher, and looks after what it leaves to itself."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        stop: StopSignal,
        report: Callable[[], object],
        *,
        is_on_cluster: bool,
    ) -> None:
        """Begin to report.

        Args:
            folder: The sweep's.
            attempt: Of the plan.
            stop: Says whether the user wants to stop.
            report: Called again and again, in a thread; tells what is new.
            is_on_cluster: Whether the jobs run on other machines.
        """
        self._folder = folder
        self._attempt = attempt
        self._stop = stop
        self._report = report
        self._is_on_cluster = is_on_cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep", daemon=True)
        self._thread.start()

    def end(self, *, has_failed: bool) -> None:
        """Wait for the jobs that still run, or stop them.

        Args:
            has_failed: Whether the launcher gave up, as it does when it loses a process.
        """
        while has_failed and not self._stop.event.is_set() and self._processes():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._stop.number is not None:
            deadline = self._stop.since + SECONDS_TO_STOP[signal.Signals(self._stop.number)]
            while self._has_jobs() and time.monotonic() < deadline and not self._stop.is_urgent:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._over.set()
        self._thread.join()
        self._report()

    def request_stop(self, number: int) -> None:
        """Let the jobs get a signal where they run, and no more of them start."""
        with suppress(InputError):
            request_stop(self._folder, self._attempt, signal.Signals(number))

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self._report()

    def _has_jobs(self) -> bool:
        """Tell whether a job runs here, or by its own account elsewhere."""
        if not self._is_on_cluster:
            return bool(self._processes())
        notes = read_notes(self._folder)
        return any(note.seconds is None and note.attempt == self._attempt for note in notes)

    def _processes(self) -> list[psutil.Process]:
        """Return the processes of jobs, ranks and submitit's tasks on this machine."""
        run = quote_value(str(self._folder))[:-1] + "/"  # the job's number follows
        task = f"{self._folder}/.submitit"
        found = []
        for process in psutil.process_iter(["cmdline"]):
            arguments = process.info["cmdline"] or ()
            if any(
                (text.startswith("hydra.run.dir=") and run in text) or text.startswith(task)
                for text in arguments
            ):
                found.append(process)
        return found


class _Marks(StopSignal):
    """What a task may know of the signals that the sweep's own process has got."""

    def __init__(self, job: SweepJob, plan: Plan | None) -> None:
        super().__init__()
        self._job = job
        # On a cluster the jobs go on when the user's session ends.
        is_on_cluster = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        self._plan = None if is_on_cluster else plan

    def wanted(self) -> signal.Signals | None:
        """Return the signal that the job shall get, if any."""
        number = requested_stop(self._job.sweep, self._job.note.attempt)
        is_alone = self._plan is not None and self._plan.is_alone
        return signal.SIGTERM if number is None and is_alone else number


def _leave_interrupts_to_the_sweep() -> None:
    """Ctrl-C reaches submitit's local tasks too; the process that the user started stops them."""
    # For good: an exception would take the task down before its job.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if "SUBMITIT_EXECUTOR" in os.environ and is_default:
        signal.signal(signal.SIGINT, lambda *_: None)  # ignored, the job would inherit it
