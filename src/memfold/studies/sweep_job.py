"""One job of a sweep: what it is started with, and what the sweep keeps of it.

The local launcher runs it in the sweep's own process, others of Hydra's, such as submitit's, in
tasks that may be on other machines.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.overrides import quote_value, unresolved
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import SWEEP_PLAN, is_completed, read_result
from memfold.runs.primary import primary_of
from memfold.runs.result import ResultFile, describe_job
from memfold.runs.sweep import (
    JobNote,
    SweepPlan,
    find_note,
    read_notes,
    requested_stop,
)
from memfold.studies.composing import group_in_wandb, meaning
from memfold.studies.process import Stopped, StopSignal, is_one_of_several_tasks, reason
from memfold.studies.runner import Runner, metric_of, variables_for

__all__ = ["CONSOLE", "SweepJob", "objective_of", "run_sweep_job"]

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


@dataclass(frozen=True)
class SweepJob:
    """A run of `train.py` that a sweep has planned."""

    cfg: DictConfig
    hydra: DictConfig
    """What `${hydra:...}` means to the job."""
    sweep: Path
    """The sweep's folder."""
    folder: Path
    note: JobNote
    command: tuple[str, ...]
    """What `python` gets."""

    @classmethod
    def of(cls, cfg: DictConfig, script: Path) -> Self:
        """Describe the job that `${hydra:...}` means now.

        Args:
            cfg: The job's configuration, with or without Hydra's.
            script: The program to start.
        """
        config: Any = HydraConfig.instance().cfg
        hydra = config.hydra
        sweep = Path(os.path.abspath(hydra.sweep.dir))
        folder = Path(hydra.runtime.output_dir)
        note = JobNote(
            number=int(hydra.job.num),
            folder=os.path.relpath(folder, sweep),
            overrides=unresolved(hydra.overrides.task),
            attempt=int(hydra.callbacks["sweep"]["attempt"]),
        )
        keys = [str(key) for key in cfg if key != "hydra"]
        cfg = OmegaConf.masked_copy(cfg, keys)
        return cls(cfg, config, sweep, folder, note, _command(cfg, script, folder))

    def bring_to_end(self, runner: Runner) -> None:
        """Run the job unless it was completed before; continue it where it has a checkpoint.

        A job is met again when its sweep is resumed, or when a cluster requeues it. Its
        `result.json` says how it ended.

        Raises:
            InputError: The folder is another job's, or a file cannot be written.
            Stopped: `runner` was told to stop before the job has started.
        """
        if self._is_done():
            return
        is_shared = is_one_of_several_tasks(os.environ)
        name = CONSOLE if is_rank_zero() else f"console_{os.environ.get('SLURM_PROCID')}.log"
        env = {key: str(value) for key, value in self.hydra.hydra.job.env_set.items()}
        own = replace(runner, variables={**variables_for(self.cfg, runner.variables), **env})
        with self._noted():
            status, _ = own.go_on(
                self.command, self.folder, self.folder / name, may_replace=not is_shared
            )
            self._explain(status, own.stop.wanted())

    def _is_done(self) -> bool:
        """Take no other job's result for one's own, where the sweeper makes jobs up as it goes."""
        note = self.note
        earlier = [other for other in read_notes(self.sweep) if other.folder == note.folder]
        for other in earlier:
            if (other.number, other.overrides) != (note.number, note.overrides):
                raise InputError(
                    f"hydra.sweep.subdir: job {note.number} ({' '.join(note.overrides)}) has the "
                    f"folder {note.folder} of job {other.number} ({' '.join(other.overrides)})"
                )
        if not is_completed(self.folder):
            return False
        if not earlier and is_rank_zero():  # its note was lost
            note.model_copy(update={"seconds": 0.0}).note(self.sweep)
        return True

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Let the sweep know when the job starts and ends."""
        start = time.monotonic()
        if is_rank_zero():
            self.note.note(self.sweep)
        try:
            yield
        finally:
            is_requeued = isinstance(sys.exception(), SystemExit)
            if is_rank_zero() and not is_requeued:
                seconds = time.monotonic() - start
                self.note.model_copy(update={"seconds": seconds}).note(self.sweep)

    def _explain(self, status: int, stop: signal.Signals | None) -> None:
        """Write down how the job ended if it could not do so itself."""
        result = read_result(self.folder)
        why = reason(status, "", result, stop)
        if status != 0 and result.get("error") != why:
            with meaning(self.hydra):
                facts = describe_job(self.cfg)
            known = {key: value for key, value in result.items() if key not in ("status", "error")}
            ResultFile(self.folder, {**facts, **known}).fail(why)


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
    plan = SweepPlan.find(job.sweep / SWEEP_PLAN)
    earlier = None if plan is None else plan.repeats.get(str(job.note.number))
    if earlier is not None:
        with suppress(OSError):  # Hydra has made it
            job.folder.rmdir()
        return objective_of(job.sweep, earlier)
    _leave_interrupts_to_the_sweep()
    with suppress(Stopped):
        job.bring_to_end(Runner(script, _Marks(job, plan)))
    return objective_of(job.sweep, job.note.number)


def objective_of(sweep: Path, number: int) -> float:
    """Return the last primary metric of a job; NaN when it has no result.

    Args:
        sweep: The sweep's folder.
        number: Of the job.
    """
    note = find_note(sweep, number)
    result = {} if note is None else read_result(sweep / note.folder)
    is_there = result.get("status") == "completed"
    value = metric_of(result, primary_of(result).name) if is_there else None
    return float("nan") if value is None else value


def _command(cfg: DictConfig, script: Path, folder: Path) -> tuple[str, ...]:
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
    return (
        str(script),
        "--config-name",
        str(hydra.job.config_name),
        *sources,
        *_resolved(hydra.overrides.task),
        *group_in_wandb(cfg, folder.parent.name, "sweep"),
        *own,
        "hydra.mode=RUN",
        f"hydra.run.dir={quote_value(str(folder))}",
        f"hydra.job.num={hydra.job.num}",
    )


def _resolved(overrides: Sequence[str]) -> list[str]:
    """Put in what the sweep alone knows; what refers to the job's own keys stays as typed."""
    resolved = []
    for number, text in enumerate(unresolved(overrides)):
        try:
            resolved.append(str(overrides[number]))
        except OmegaConfBaseException:
            resolved.append(text)
    return resolved


class _Marks(StopSignal):
    """What a task may know of the signals that the sweep's own process has got: by files."""

    def __init__(self, job: SweepJob, plan: SweepPlan | None) -> None:
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
