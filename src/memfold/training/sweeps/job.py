"""One job of a sweep, in whichever process the launcher calls for it."""

import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from memfold.errors import InputError
from memfold.overrides import unresolved
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import can_be_resumed, read_result
from memfold.training.sweeps.devices import device_slot, num_parallel_jobs
from memfold.training.sweeps.folder import JobNote, Plan, read_notes, requested_stop
from memfold.training.sweeps.isolation import run_isolated

__all__ = ["run_sweep_job"]

_TERMINATED = 143  # 128 + SIGTERM


class _Sweep:
    """The sweep that the current job is of, as a job's process sees it."""

    def __init__(self) -> None:
        hydra = HydraConfig.get()
        self.folder = Path(os.path.abspath(hydra.sweep.dir))
        self.attempt = int(hydra.callbacks["sweep"]["attempt"])
        self.num_parallel_jobs = num_parallel_jobs(hydra.launcher)
        self._plan = Plan.read(self.folder)
        # On a cluster the jobs go on when the user's session ends.
        self._is_on_cluster = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"

    @property
    def is_own_process(self) -> bool:
        """Whether this is the process that the user has started."""
        plan = self._plan
        return plan is None or (plan.pid == os.getpid() and plan.host == socket.gethostname())

    @property
    def is_alone(self) -> bool:
        """Whether the process that the user has started was killed."""
        return self._plan is not None and not self._is_on_cluster and self._plan.is_alone

    def repeats(self, number: int) -> int | None:
        """Return the number of the earlier job that this one repeats, if any."""
        return None if self._plan is None else self._plan.repeats.get(str(number))

    def wanted_stop(self) -> signal.Signals | None:
        """Return the signal that the job shall get, if any."""
        number = requested_stop(self.folder, self.attempt)
        return signal.SIGTERM if number is None and self.is_alone else number


def run_sweep_job(cfg: DictConfig, script: Path) -> float | None:
    """Run one job unless it was completed before; continue it where it has a checkpoint.

    A job is met again when its sweep is resumed, or when a cluster requeues it.

    Args:
        cfg: The job's configuration.
        script: The program to start.

    Returns:
        The last validation accuracy; NaN when the job failed, so that the sweep goes on. A job that
        would repeat an earlier one has that of the earlier one, once it is there.

    Raises:
        KeyboardInterrupt: The sweep is to stop, and this is its own process.
        InputError: The folder is another job's.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    sweep = _Sweep()
    note = _new_note(sweep, folder)
    earlier_number = sweep.repeats(note.number)
    if earlier_number is not None:
        with suppress(OSError):  # Hydra has made it
            folder.rmdir()
        done = [other for other in read_notes(sweep.folder) if other.number == earlier_number]
        return _accuracy(sweep.folder / done[0].folder) if done else float("nan")
    earlier = [other for other in read_notes(sweep.folder) if other.folder == note.folder]
    _refuse_other_job(note, earlier)
    if read_result(folder).get("status") == "completed":
        if not earlier and is_rank_zero():  # its note was lost
            dataclasses.replace(note, seconds=0.0).write(sweep.folder)
        return _accuracy(folder)
    if not sweep.is_own_process:
        _leave_interrupts_to_the_sweep()
    if sweep.wanted_stop() is None:
        with _noted(sweep, note):
            _run(cfg, script, folder, sweep)
    if sweep.wanted_stop() is not None:
        if sweep.is_alone:
            os._exit(_TERMINATED)  # joblib would catch SystemExit and start the next job
        if sweep.is_own_process:
            raise KeyboardInterrupt
    return _accuracy(folder)


def _run(cfg: DictConfig, script: Path, folder: Path, sweep: _Sweep) -> None:
    is_unfinished = can_be_resumed(folder)
    if not cfg.extras.isolate_jobs:
        from memfold.training import run

        if is_unfinished:
            cfg.resume = str(folder)
        run(cfg)
        return
    with device_slot(sweep.folder, cfg, sweep.num_parallel_jobs) as device:
        run_isolated(
            cfg, script, resume=is_unfinished, device=device, wanted_stop=sweep.wanted_stop
        )


def _new_note(sweep: _Sweep, folder: Path) -> JobNote:
    hydra = HydraConfig.get()
    relative = os.path.relpath(folder, sweep.folder)
    return JobNote(int(hydra.job.num), relative, unresolved(hydra.overrides.task), sweep.attempt)


def _refuse_other_job(note: JobNote, earlier: Sequence[JobNote]) -> None:
    """Take no other job's result for one's own, where the sweeper made the jobs up as it went."""
    for other in earlier:
        if (other.number, other.overrides) != (note.number, note.overrides):
            raise InputError(
                f"hydra.sweep.subdir: job {note.number} ({' '.join(note.overrides)}) has the "
                f"folder {note.folder} of job {other.number} ({' '.join(other.overrides)})"
            )


@contextmanager
def _noted(sweep: _Sweep, note: JobNote) -> Iterator[None]:
    """Let the sweep's own process know when the job starts and ends."""
    start = time.monotonic()
    if is_rank_zero():
        note.write(sweep.folder)
    try:
        yield
    finally:
        is_requeued = isinstance(sys.exception(), SystemExit)
        if is_rank_zero() and not is_requeued:
            dataclasses.replace(note, seconds=time.monotonic() - start).write(sweep.folder)


def _leave_interrupts_to_the_sweep() -> None:
    """Ctrl-C reaches this process too; the one that was started by the user stops the jobs."""
    # For good: an exception would take the launcher, and with it the other jobs, down.
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: None)  # ignored, the job would inherit it


def _accuracy(folder: Path) -> float:
    result = read_result(folder)
    metrics = result.get("metrics") if result.get("status") == "completed" else None
    accuracy = metrics.get("val/acc") if isinstance(metrics, dict) else None
    return float("nan") if accuracy is None else float(accuracy)
