"""The sweep that this process runs: from Hydra's first callback until the exit status."""

import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

import psutil
from omegaconf import DictConfig, OmegaConf, open_dict

from memfold.errors import InputError
from memfold.overrides import quote_value, unresolved
from memfold.runs.folder import is_completed, read_result, writing
from memfold.runs.locks import locked
from memfold.studies.executor import name_visible_devices, num_parallel_jobs
from memfold.studies.process import SECONDS_TO_STOP
from memfold.studies.sweep_arguments import resume_arguments
from memfold.studies.sweep_folder import PLAN, read_notes, request_stop
from memfold.studies.sweep_job import CONSOLE
from memfold.studies.sweep_plan import admit, common_overrides, sweep_folder
from memfold.studies.sweep_report import (
    describe_end,
    print_table,
    report_command,
    upload_command,
)

__all__ = ["RunningSweep"]

_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_OF_ONE_REQUEST = 2.0
"""A process group and its members may be signalled both; only what comes later is impatience."""


class RunningSweep:
    """Locks the folder, reports on the jobs, and stops them when this process is signalled."""

    def __init__(self, config: DictConfig, *, resume: bool) -> None:
        """Take possession of the sweep's folder and begin to report.

        Args:
            config: The composed configuration, with Hydra's, before the sweeper gets it.
            resume: Whether to go on with the sweep that is in the folder.

        Raises:
            InputError: The folder is in use or holds another sweep, or cannot be written.
        """
        self.folder = sweep_folder(config)
        self.is_isolated = bool(config.extras.isolate_jobs)
        launcher = str(OmegaConf.select(config, "hydra.launcher._target_"))
        self._is_on_cluster = launcher.endswith(".SlurmLauncher")
        self._held = ExitStack()
        self._over = threading.Event()
        self._is_given_up = False  # the launcher shall not go on to its end
        self._is_ending = False
        self._is_urgent = False
        self._stopped_by: signal.Signals | None = None
        self._stopped_at = 0.0
        _refuse_several_tasks(config.hydra)
        num_parallel_jobs(config.hydra.launcher)  # refuses a wrong number
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.folder))
        self._plan = admit(config, self.folder, resume=resume)
        self._plan.write(self.folder / PLAN)
        self._common = common_overrides(config)
        self._reported: set[int] = set()
        name_visible_devices(config)
        self._adapt(config)
        self._announce(config.hydra)
        if self.is_isolated:
            # A shell that starts a program in the background lets it ignore Ctrl-C.
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)
        self._thread = threading.Thread(target=self._watch, name="sweep", daemon=True)
        self._thread.start()

    def end(self, status: int) -> int:
        """Wait for what still runs, print the table, and return the exit status.

        Args:
            status: What it would be by what the launcher did: 0 when it came to its end.
        """
        self._is_ending = True
        while status and self._stopped_by is None and self._job_processes():
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # the launcher gave up at the first loss
        if self._stopped_by is not None:
            self._end_leftovers()
        self._over.set()
        self._thread.join()
        self._report()
        self._held.close()
        if status and not read_notes(self.folder):  # refused before any job was started
            return status if self._stopped_by is None else 128 + self._stopped_by
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
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        return status or int(num_failed + num_missing > 0)

    def _adapt(self, config: DictConfig) -> None:
        """Add to the overrides with which Hydra composes every job."""
        added = [f"hydra.callbacks.sweep.attempt={self._plan.attempt}"]
        if self.is_isolated:  # the job's own process writes its .hydra
            added.append("hydra.output_subdir=null")
        with open_dict(config):
            # As typed: ${seed} in hydra.sweep.subdir is another one in each job.
            config.hydra.overrides.hydra = [*unresolved(config.hydra.overrides.hydra), *added]

    def _announce(self, hydra: DictConfig) -> None:
        launcher = str(hydra.runtime.choices.get("hydra/launcher"))
        at_once = num_parallel_jobs(hydra.launcher)
        how = "one after the other" if launcher == "basic" else f"with {launcher}"
        if at_once > 1:
            how = f"{at_once} at once"
        num_jobs = "jobs" if self._plan.jobs is None else f"{len(self._plan.jobs)} jobs"
        if self._plan.repeats:
            repeats = len(self._plan.repeats)
            how += f"; {repeats} would repeat another, whose strategy has one ratio: not run"
        where = ""
        if self.is_isolated:
            where = (
                f"; what each prints is in <job>/{CONSOLE}, its progress in "
                f"<job>/{hydra.job.name}.log"
            )
        _say(f"{num_jobs} in {self.folder}, {how}{where}")
        for note in read_notes(self.folder):
            if is_completed(self.folder / note.folder):
                self._say_of_job(note.number, note.overrides, "already completed")

    def _say_of_job(self, number: int, overrides: list[str], end: str) -> None:
        self._reported.add(number)
        jobs = self._plan.jobs
        of_all = "" if jobs is None else f"/{len(jobs) - len(self._plan.repeats)}"
        varied = "".join(f" {text}" for text in overrides if text not in self._common)
        _say(f"[{len(self._reported)}{of_all}] {number}:{varied}{':' if varied else ''} {end}")

    def _report(self) -> None:
        for note in read_notes(self.folder, known=self._reported):
            if note.attempt == self._plan.attempt and note.seconds is not None:
                result = read_result(self.folder / note.folder)
                self._say_of_job(note.number, note.overrides, describe_end(result, note.seconds))

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self._report()
            if self._stopped_by is None or self._is_given_up or self._is_ending:
                continue
            waited = time.monotonic() - self._stopped_at
            is_late = waited > SECONDS_TO_STOP[self._stopped_by]
            # At first, a process that was just being started may not be seen yet.
            if is_late or (waited > _SECONDS_OF_ONE_REQUEST and not self._has_jobs()):
                self._is_given_up = True  # jobs that have not started yet are not waited for
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop the jobs where they run; the launcher then comes to its end by itself."""
        if self._over.is_set():
            return
        if self._stopped_by is None:
            self._stopped_at = time.monotonic()
            self._stopped_by = signal.Signals(number)
            with suppress(InputError):
                request_stop(self.folder, self._plan.attempt, self._stopped_by)
        elif self._is_given_up or time.monotonic() - self._stopped_at > _SECONDS_OF_ONE_REQUEST:
            self._is_given_up = self._is_urgent = True
            if not self._is_ending:
                raise KeyboardInterrupt

    def _end_leftovers(self) -> None:
        """Let the jobs end, which the launcher may have left to themselves; then kill them."""
        assert self._stopped_by is not None
        deadline = self._stopped_at + SECONDS_TO_STOP[self._stopped_by]
        while self._has_jobs() and time.monotonic() < deadline and not self._is_urgent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        for process in self._job_processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _has_jobs(self) -> bool:
        """Tell whether a job runs here, or by its own account elsewhere."""
        if not self._is_on_cluster:
            return bool(self._job_processes())
        notes = read_notes(self.folder, known=self._reported)
        return any(n.seconds is None and n.attempt == self._plan.attempt for n in notes)

    def _job_processes(self) -> list[psutil.Process]:
        """Return the processes of jobs, ranks and submitit's tasks on this machine."""
        run = quote_value(str(self.folder))[:-1] + "/"  # the job's number follows
        task = f"{self.folder}/.submitit"
        found = []
        for process in psutil.process_iter(["cmdline"]):
            arguments = process.info["cmdline"] or ()
            if any(
                (text.startswith("hydra.run.dir=") and run in text) or text.startswith(task)
                for text in arguments
            ):
                found.append(process)
        return found


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more: the jobs go on
        print(line, flush=True)


def _refuse_several_tasks(hydra: DictConfig) -> None:
    num_tasks = OmegaConf.select(hydra, "launcher.tasks_per_node", default=1)
    is_local = str(OmegaConf.select(hydra, "launcher._target_")).endswith(".LocalLauncher")
    if is_local and num_tasks != 1:
        raise InputError(
            f"hydra.launcher.tasks_per_node={num_tasks}: submitit_local starts one process per "
            "job, which starts the others itself: trainer=ddp trainer.devices=N"
        )
