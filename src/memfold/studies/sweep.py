"""The sweep that this process runs: from Hydra's first callback until the exit status."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from memfold.errors import InputError
from memfold.files import make_folder
from memfold.overrides import quote_value, unresolved
from memfold.runs.folder import SWEEP_PLAN, is_completed, read_result
from memfold.runs.locks import locked
from memfold.runs.sweep import read_notes, request_stop
from memfold.studies.composing import composed_job
from memfold.studies.process import SECONDS_TO_STOP, Stopped, StopSignal
from memfold.studies.runner import runners, share_work
from memfold.studies.sweep_job import CONSOLE, SweepJob, objective_of
from memfold.studies.sweep_plan import admit, resume_arguments, sweep_folder
from memfold.studies.sweep_report import (
    describe_end,
    print_table,
    report_command,
    upload_command,
)

__all__ = ["RunningSweep", "num_parallel_jobs"]

_SECONDS_BETWEEN_LOOKS = 0.3
_LOCAL = "hydra_plugins.memfold.launcher.LocalSlots"


class RunningSweep:
    """Locks the folder, runs the jobs or has them run, and reports on them."""

    def __init__(self, config: DictConfig, *, resume: bool) -> None:
        """Take possession of the sweep's folder and begin to report.

        Args:
            config: The composed configuration, with Hydra's, before the sweeper gets it.
            resume: Whether to go on with the sweep that is in the folder.

        Raises:
            InputError: The folder is in use or holds another sweep, or cannot be written.
        """
        self.folder = sweep_folder(config)
        self._config = config
        self._stop = StopSignal(lets_save=False)
        self._held = ExitStack()
        self._at_once = num_parallel_jobs(config.hydra.launcher)
        _refuse_several_tasks(config.hydra)
        make_folder(self.folder)
        self._held.enter_context(locked(self.folder))
        self._plan = admit(config, self.folder, resume=resume)
        self._plan.write(self.folder / SWEEP_PLAN)
        # What all jobs have says nothing of one.
        self._common = set.intersection(*map(set, self._plan.jobs or [[]]))
        self._reported: set[int] = set()
        self._adapt(config)
        self._announce(config.hydra)
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._report_until_over, name="sweep", daemon=True)
        self._watch.start()
        self._held.enter_context(self._stop.caught(self._interrupt))

    def run_jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run jobs on this machine to their end.

        Args:
            job_overrides: Of each.
            first: Number of the first.

        Returns:
            The last primary metric of each; NaN when it failed. A job that would repeat an
            earlier one has that of the earlier one.

        Raises:
            KeyboardInterrupt: The user wants to stop; all jobs have ended.
            InputError: A job has the folder of another, or a file cannot be written.
            HydraException, OmegaConfBaseException: A job cannot be composed; none has started.
        """
        numbered = dict(enumerate(map(list, job_overrides), first))
        program = Path(sys.argv[0]).resolve()
        jobs: dict[Path, SweepJob] = {}
        for number, overrides in numbered.items():
            if str(number) in self._plan.repeats:
                continue
            with composed_job(self._config, number, overrides) as config:
                job = SweepJob.of(config, program)
            other = jobs.setdefault(job.folder, job)
            if other is not job:
                raise InputError(
                    f"hydra.sweep.subdir gives jobs {other.note.number} and {number} one folder, "
                    f"{job.note.folder}; name each swept key in it, or ${{hydra.job.num}}"
                )
        workers = runners(program, min(self._at_once, len(numbered)), self._stop)
        with self._stop.caught():
            try:
                share_work(jobs.values(), workers, lambda worker, job: job.bring_to_end(worker))
            except Stopped:
                raise KeyboardInterrupt from None
        returned = []
        for number, overrides in numbered.items():
            value = objective_of(self.folder, self._plan.repeats.get(str(number), number))
            done = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
            done.return_value = value
            returned.append(done)
        return returned

    def end(self, status: int) -> int:
        """Wait for what still runs, print the table, and return the exit status.

        Args:
            status: What it would be by what the launcher did: 0 when it came to its end.
        """
        with self._stop.caught():
            self._wait_for_tasks(has_failed=status != 0)
            self._over.set()
            self._watch.join()
            self._report()
        self._held.close()
        if self._stop.number is not None:
            status = 128 + self._stop.number
        if status and not read_notes(self.folder):  # refused before any job was started
            return status
        num_jobs, num_failed, num_missing = print_table(self.folder, self._plan)
        report = report_command(self.folder, Path(sys.argv[0]))
        if report is not None:
            print(f"compare the runs with: {report}")
        upload = upload_command(self.folder)
        if upload is not None:
            print(f"W&B was offline; upload with: {upload}")
        if num_failed or num_missing:
            missing = f" and {num_missing} left no result" if num_missing else ""
            again = shlex.join(["python", sys.argv[0], *resume_arguments(self.folder)])
            print(
                f"error: {num_failed} of {num_jobs} jobs failed{missing}; run them again with: "
                f"{again}",
                file=sys.stderr,
            )
        return status or int(num_failed + num_missing > 0)

    def _wait_for_tasks(self, *, has_failed: bool) -> None:
        """Wait for jobs that the launcher has left to themselves, or stop them.

        Args:
            has_failed: Whether it gave up, as it does when it loses a process.
        """
        while has_failed and not self._stop.event.is_set() and _processes(self.folder):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._stop.number is None:
            return
        deadline = self._stop.since + SECONDS_TO_STOP[signal.Signals(self._stop.number)]
        while self._has_jobs() and time.monotonic() < deadline and not self._stop.is_urgent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        for process in _processes(self.folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _has_jobs(self) -> bool:
        """Tell whether a job runs here, or by its own account on a cluster."""
        if not _launcher(self._config.hydra).endswith(".SlurmLauncher"):
            return bool(_processes(self.folder))
        notes = read_notes(self.folder)
        return any(note.seconds is None and note.attempt == self._plan.attempt for note in notes)

    def _adapt(self, config: DictConfig) -> None:
        """Add to the overrides with which Hydra composes every job."""
        # The job's own process writes its .hydra.
        added = [f"hydra.callbacks.sweep.attempt={self._plan.attempt}", "hydra.output_subdir=null"]
        with open_dict(config):
            # As typed: ${seed} in hydra.sweep.subdir is another one in each job.
            config.hydra.overrides.hydra = [*unresolved(config.hydra.overrides.hydra), *added]

    def _announce(self, hydra: DictConfig) -> None:
        how = "one after the other" if self._at_once == 1 else f"{self._at_once} at once"
        if _launcher(hydra) != _LOCAL:
            how = f"with {hydra.runtime.choices.get('hydra/launcher')}"
        num_jobs = "jobs" if self._plan.jobs is None else f"{len(self._plan.jobs)} jobs"
        if self._plan.repeats:
            repeats = len(self._plan.repeats)
            how += f"; {repeats} would repeat another, whose strategy has one ratio: not run"
        _say(
            f"{num_jobs} in {self.folder}, {how}; what each prints is in <job>/{CONSOLE}, its "
            f"progress in <job>/{hydra.job.name}.log"
        )
        for note in read_notes(self.folder):
            if is_completed(self.folder / note.folder):
                self._say_of_job(note.number, note.overrides, "already completed")

    def _say_of_job(self, number: int, overrides: list[str], end: str) -> None:
        self._reported.add(number)
        jobs = self._plan.jobs
        of_all = "" if jobs is None else f"/{len(jobs) - len(self._plan.repeats)}"
        varied = "".join(f" {text}" for text in overrides if text not in self._common)
        _say(f"[{len(self._reported)}{of_all}] {number}:{varied}{':' if varied else ''} {end}")

    def _report_until_over(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self._report()

    def _report(self) -> None:
        for note in read_notes(self.folder, known=self._reported):
            if note.attempt == self._plan.attempt and note.seconds is not None:
                end = describe_end(read_result(self.folder / note.folder), note.seconds)
                self._say_of_job(note.number, note.overrides, end)

    def _interrupt(self, number: int, *_: object) -> None:
        """End the launcher, whatever it does, and then the jobs that it leaves to themselves."""
        self._stop.note(number)
        with suppress(InputError):
            request_stop(self.folder, self._plan.attempt, signal.Signals(number))
        raise KeyboardInterrupt


def num_parallel_jobs(launcher: Mapping[str, Any]) -> int:
    """Return how many jobs are run at once on this machine; 1 with a launcher that cannot say.

    Raises:
        InputError: It is none at all.
    """
    n_jobs = launcher.get("n_jobs", 1)
    if n_jobs == -1:
        return len(os.sched_getaffinity(0))
    if not isinstance(n_jobs, int) or n_jobs < 1:
        raise InputError(
            f"hydra.launcher.n_jobs={n_jobs}: 1 or more jobs at once, or -1 for one per core"
        )
    return n_jobs


def _launcher(hydra: DictConfig) -> str:
    return str(hydra.launcher["_target_"])


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more: the jobs go on
        print(line, flush=True)


def _refuse_several_tasks(hydra: DictConfig) -> None:
    num_tasks = hydra.launcher.get("tasks_per_node", 1)
    if _launcher(hydra).endswith(".LocalLauncher") and num_tasks != 1:
        raise InputError(
            f"hydra.launcher.tasks_per_node={num_tasks}: submitit_local starts one process per "
            "job, which starts the others itself: trainer=ddp trainer.devices=N"
        )


def _processes(folder: Path) -> list[psutil.Process]:
    """Return the processes of jobs, ranks and submitit's tasks of a sweep on this machine."""
    run = quote_value(str(folder))[:-1] + "/"  # the job's number follows
    task = f"{folder}/.submitit"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or ()
        if any(
            (text.startswith("hydra.run.dir=") and run in text) or text.startswith(task)
            for text in arguments
        ):
            found.append(process)
    return found
