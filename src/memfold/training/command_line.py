"""What `train.py` does around Hydra: resumed runs, one-line errors, exit statuses."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from memfold.errors import InputError
from memfold.processes.external_launch import expand_for_launcher
from memfold.processes.ranks import end_with_parent, is_rank_zero, refuse_leftover_rank
from memfold.runs.folder import can_be_resumed
from memfold.runs.resume import expand_arguments, resume_command
from memfold.training import run
from memfold.training.arguments import refuse_wrong_arguments
from memfold.training.sweeps.arguments import expand_sweep_arguments
from memfold.training.sweeps.job import run_sweep_job
from memfold.training.sweeps.running import running_sweep

__all__ = ["describe_error", "launch", "report_error", "run_task"]

USER_ERRORS = (InputError, HydraException, OmegaConfBaseException)
INTERRUPTED = 130  # 128 + SIGINT, what a shell expects


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
        expanded = expand_arguments(expand_for_launcher(arguments, os.environ))
        sys.argv[1:] = expand_sweep_arguments(expanded)
        main()
    except KeyboardInterrupt as interrupt:
        status = INTERRUPTED
        if running_sweep() is None and is_rank_zero():  # a sweep has more to say
            print(str(interrupt) or "interrupted (Ctrl-C)", file=sys.stderr)
    except USER_ERRORS as error:
        status = report_error(error, with_traceback=with_traceback)
    except Exception as error:
        sweep = running_sweep()
        # Hydra says so what is wrong with flags of its own; or a launcher lost a process.
        is_said = _is_said_by_hydra(error) or (sweep is not None and sweep.is_isolated)
        if sweep is None and not is_said:
            raise
        status = report_error(error, with_traceback=with_traceback or not is_said)
    sweep = running_sweep()
    return status if sweep is None else sweep.end(status)


def run_task(cfg: DictConfig, script: Path) -> float | None:
    """Run one job: here, unless it belongs to a sweep.

    Args:
        cfg: The job's configuration.
        script: The program that a sweep starts again for each job.

    Returns:
        The last validation accuracy for Hydra's sweepers; NaN when a job of a sweep failed.

    Raises:
        SystemExit: After a user's mistake, with status 1; outside sweeps.
    """
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return run_sweep_job(cfg, script)
    try:
        metrics = run(cfg)["metrics"]
    except KeyboardInterrupt:
        folder = Path(HydraConfig.get().runtime.output_dir)
        raise KeyboardInterrupt(_after_interrupt(folder)) from None
    except USER_ERRORS as error:
        # An exception that passes through Hydra would add its own lines to ours.
        raise SystemExit(report_error(error, with_traceback=_wants_traceback(cfg))) from None
    assert isinstance(metrics, dict)
    return metrics.get("val/acc")


def _is_said_by_hydra(error: Exception) -> bool:
    """Whether Hydra itself looked for a mistake and found one."""
    if not isinstance(error, ValueError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("hydra.")


def _after_interrupt(folder: Path) -> str:
    how = "; continue" if can_be_resumed(folder) else " before the first checkpoint; start again"
    return f"interrupted (Ctrl-C){how} with: {resume_command(folder)}"


def _wants_traceback(cfg: DictConfig) -> bool:
    return OmegaConf.select(cfg, "extras.traceback") is True


def report_error(error: BaseException, *, with_traceback: bool) -> int:
    """Print `error: ...` on stderr, on rank 0 alone, and return exit status 1."""
    if is_rank_zero():
        if with_traceback:
            traceback.print_exception(error)
        print(f"error: {describe_error(error)}", file=sys.stderr)
    return 1


def describe_error(error: BaseException) -> str:
    """Say in one line what is wrong and what is allowed."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        hint = (
            " (more with: pip install -c constraints.txt -e '.[cluster]')"
            if error.options == ["basic"]
            else ""
        )
        return f"{group}={choice} is unknown; available: {', '.join(sorted(error.options))}{hint}"
    message = str(error)
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        message = f"{error.override}: {message}"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        keys = cause.parent_node if isinstance(cause.parent_node, DictConfig) else ()
        known = ", ".join(sorted(str(key) for key in keys if key not in ("hydra", "_target_")))
        message = f"{cause.full_key} is no key of the configuration; keys there: {known}"
    elif isinstance(cause, OmegaConfBaseException):
        message += f" ({cause})"
    return " ".join(message.split())
