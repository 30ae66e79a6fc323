"""One job of a sweep, in whichever process the launcher calls for it."""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.overrides import quote_value, unresolved
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import LOCK, can_be_resumed, is_completed, read_result, writing
from memfold.runs.result import UNFINISHED, ResultFile, describe_job
from memfold.studies.executor import device_slot, num_parallel_jobs
from memfold.studies.process import ended, is_one_of_several_tasks, run_program
from memfold.studies.sweep_folder import JobNote, Plan, read_notes, requested_stop

__all__ = ["CONSOLE", "run_sweep_job"]

CONSOLE = "console.log"
_OF_THE_SWEEP = (
    "hydra.mode=",
    "hydra.sweep",
    "hydra/sweeper",
    "hydra/launcher",
    "hydra.launcher",
    "hydra.callbacks.sweep.",
    "hydra.output_subdir=null",
)
# How a run says that it cannot be resumed whatever the user does; another model or another
# configuration is no such reason.
_DAMAGED = re.compile(
    r"^error: resume(: .*(damaged or no checkpoint|is no checkpoint|pickled Python objects)"
    r"|=.* cannot be read)",
    re.MULTILINE,
)
_TERMINATED = 143  # 128 + SIGTERM


class _Sweep:
    """The sweep that the current job is of, as a job's process sees it."""

    def __init__(self) -> None:
        hydra = HydraConfig.get()
        self.folder = Path(os.path.abspath(hydra.sweep.dir))
        self.attempt = int(hydra.callbacks["sweep"]["attempt"])
        self.num_parallel_jobs = num_parallel_jobs(hydra.launcher)
        self._plan = Plan.find(self.folder)
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
    if is_completed(folder):
        if not earlier and is_rank_zero():  # its note was lost
            note.model_copy(update={"seconds": 0.0}).note(sweep.folder)
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
        _run_isolated(cfg, script, folder, sweep, device, resume=is_unfinished)


def _run_isolated(
    cfg: DictConfig,
    script: Path,
    folder: Path,
    sweep: _Sweep,
    device: str | None,
    *,
    resume: bool,
) -> None:
    """Run the job as `python script ... hydra.mode=RUN`; its `result.json` says how it ended."""
    variables = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    command = _command(cfg, script, folder)
    again = [f"resume={quote_value(str(folder))}"] if resume else []
    name = CONSOLE if is_rank_zero() else f"console_{os.environ.get('SLURM_PROCID')}.log"
    with _noting_sigterm() as received:

        def run(arguments: Sequence[str]) -> tuple[int, str]:
            def wanted_stop() -> signal.Signals | None:
                return received[0] if received else sweep.wanted_stop()

            return run_program(arguments, folder / name, variables, wanted_stop)

        status, printed = run([*command, *again])
        is_damaged = status > 0 and _DAMAGED.search(printed) is not None
        if resume and is_damaged and not is_one_of_several_tasks(os.environ):
            _remove_run(folder)
            status, _ = run(command)
    result = read_result(folder)
    is_explained = result.get("status") == "failed" and result.get("error") != UNFINISHED
    if status < 0 or (status > 0 and not is_explained):
        known = {key: value for key, value in result.items() if key not in ("status", "error")}
        ResultFile(folder, {**describe_job(cfg), **known}).fail(
            f"the job's process {ended(status)}"
        )


def _new_note(sweep: _Sweep, folder: Path) -> JobNote:
    hydra = HydraConfig.get()
    relative = os.path.relpath(folder, sweep.folder)
    return JobNote(
        number=int(hydra.job.num),
        folder=relative,
        overrides=unresolved(hydra.overrides.task),
        attempt=sweep.attempt,
    )


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
        note.note(sweep.folder)
    try:
        yield
    finally:
        is_requeued = isinstance(sys.exception(), SystemExit)
        if is_rank_zero() and not is_requeued:
            seconds = time.monotonic() - start
            note.model_copy(update={"seconds": seconds}).note(sweep.folder)


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


def _command(cfg: DictConfig, script: Path, folder: Path) -> list[str]:
    hydra = HydraConfig.get()
    # --config-path replaces what Hydra calls main, --config-dir adds to it.
    flags = {"main": "--config-path", "command-line": "--config-dir"}
    sources = [
        text
        for source in hydra.runtime.config_sources
        if source.provider in flags and source.schema == "file"
        for text in (flags[source.provider], source.path)
    ]
    own = [
        text
        for text in _resolved(hydra.overrides.hydra)
        if not text.lstrip("+~").startswith(_OF_THE_SWEEP)
    ]
    # One sweep is one group in W&B, unless the user named another.
    in_wandb = {"group": quote_value(folder.parent.name), "job_type": "sweep"}
    named = [
        f"logger.{key}={value}"
        for key, value in in_wandb.items()
        if key in cfg.logger and OmegaConf.select(cfg, f"logger.{key}") is None
    ]
    return [
        str(script),
        "--config-name",
        str(hydra.job.config_name),
        *sources,
        *_resolved(hydra.overrides.task),
        *named,
        *own,
        "hydra.mode=RUN",
        f"hydra.run.dir={quote_value(str(folder))}",
        f"hydra.job.num={hydra.job.num}",
    ]


def _resolved(overrides: Sequence[str]) -> list[str]:
    """Put in what the sweep alone knows; what refers to the job's own keys stays as typed."""
    resolved = []
    for number, text in enumerate(unresolved(overrides)):
        try:
            resolved.append(str(overrides[number]))
        except OmegaConfBaseException:
            resolved.append(text)
    return resolved


def _remove_run(folder: Path) -> None:
    """Remove what an unfinished run has left, but for what it printed."""
    for path in folder.iterdir():
        if path.name != LOCK and path.suffix != ".log":
            with writing(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _noting_sigterm() -> Iterator[list[signal.Signals]]:
    """Let SIGTERM to a worker end its job first, unless somebody else handles it."""
    received: list[signal.Signals] = []
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield received
        return
    signal.signal(signal.SIGTERM, lambda *_: received.append(signal.SIGTERM))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
