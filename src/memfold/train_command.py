"""What `train.py` does around Hydra: one run, or with -m a sweep; exit statuses."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.processes.external_launch import expand_for_launcher
from memfold.processes.ranks import end_with_parent, is_rank_zero, refuse_leftover_rank
from memfold.runs.folder import can_be_resumed
from memfold.runs.resume import expand_arguments, resume_command
from memfold.training import run
from memfold.training.argument_rules import refuse_wrong_arguments
from memfold.training.hydra_callbacks import exiting
from memfold.training.user_errors import USER_ERRORS, report_error

if TYPE_CHECKING:
    from memfold.studies.sweep import RunningSweep

__all__ = ["Sweep", "launch", "run_task", "running_sweep"]

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects
_running: "RunningSweep | None" = None


def launch(main: Callable[[], object]) -> int:
    """Run a `@hydra.main` function on `sys.argv`.

    Returns:
        The exit status: 0, 1 after a user's mistake (one line on stderr) or when a job of a sweep
        failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    arguments = sys.argv[1:]
    wanted = {"debug=trace", "extras.traceback=true"}
    with_traceback = any(text.lower() in wanted for text in arguments)
    status = 0
    try:
        refuse_leftover_rank(os.environ)
    except InputError as error:  # report_error would believe that rank
        print(f"error: {error}", file=sys.stderr)
        return 1
    end_with_parent()
    try:
        refuse_wrong_arguments(arguments)
        sys.argv[1:] = expand_arguments(expand_for_launcher(arguments, os.environ))
        if any(text.startswith("sweep.resume=") for text in arguments):
            from memfold.studies.sweep_plan import expand_sweep_arguments

            sys.argv[1:] = expand_sweep_arguments(sys.argv[1:])
        main()
    except KeyboardInterrupt as interrupt:
        status = INTERRUPTED
        if _running is None and is_rank_zero():  # a sweep has more to say
            print(str(interrupt) or "interrupted (Ctrl-C)", file=sys.stderr)
    except USER_ERRORS as error:
        status = report_error(error, with_traceback=with_traceback)
    except Exception as error:
        # Hydra says so what is wrong with flags of its own; or a launcher lost a process.
        is_said = _is_said_by_hydra(error) or _running is not None
        if not is_said:
            raise
        status = report_error(error, with_traceback=with_traceback)
    return status if _running is None else _running.end(status)


def run_task(cfg: DictConfig, script: Path) -> float | None:
    """Run one job: here, unless it belongs to a sweep.

    Args:
        cfg: The job's configuration.
        script: The program that a sweep starts again for each job.

    Returns:
        The task's primary metric, for Hydra's sweepers; NaN when a job of a sweep failed.

    Raises:
        SystemExit: After a user's mistake, with status 1; outside sweeps.
    """
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        from memfold.studies.sweep_job import run_sweep_job

        return run_sweep_job(cfg, script)
    try:
        result = run(cfg)
    except KeyboardInterrupt:
        folder = Path(HydraConfig.get().runtime.output_dir)
        raise KeyboardInterrupt(_after_interrupt(folder)) from None
    except USER_ERRORS as error:
        # An exception that passes through Hydra would add its own lines to ours.
        with_traceback = OmegaConf.select(cfg, "extras.traceback") is True
        raise SystemExit(report_error(error, with_traceback=with_traceback)) from None
    return result["metrics"].get(result["primary"]["name"])


def running_sweep() -> "RunningSweep":
    """Return the sweep that `Sweep` has begun."""
    assert _running is not None
    return _running


class Sweep(Callback):
    """Hydra's callback that begins a sweep before its first job; `launch` ends it."""

    def __init__(self, *, resume: bool = False, attempt: int = 0) -> None:
        """Keep what a sweep is started with.

        Args:
            resume: Whether to go on with the sweep that is in the folder.
            attempt: Set for each job: which start of the sweep it belongs to.
        """
        self._resume = resume

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Begin the sweep."""
        global _running
        from memfold.studies.sweep import RunningSweep

        with exiting():
            _running = RunningSweep(config, resume=self._resume)


def _is_said_by_hydra(error: Exception) -> bool:
    """Whether Hydra itself looked for a mistake and found one."""
    if not isinstance(error, ValueError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("hydra.")


def _after_interrupt(folder: Path) -> str:
    how = "; continue" if can_be_resumed(folder) else " before the first checkpoint; start again"
    return f"interrupted (Ctrl-C){how} with: {resume_command(folder)}"
