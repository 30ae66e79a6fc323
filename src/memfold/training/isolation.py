"""Each job of a sweep in its own process.

Lightning's DDP launcher starts the program again with the same arguments, which replays the whole
sweep in every child, and it leaves environment variables behind that spoil the next job. A process
of its own gives each job clean variables, memory statistics and loggers, and a job that dies takes
no other with it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from memfold.training.processes import LAUNCHER_VARIABLES
from memfold.training.result import ResultFile, describe_job
from memfold.training.resume import quote_value
from memfold.training.run_folder import read_result

__all__ = ["run_isolated"]

_SECONDS_TO_STOP = 20.0
_TERMINATED = 143  # 128 + SIGTERM
_OF_THE_SWEEP = ("hydra.mode=", "hydra.sweep", "hydra/sweeper", "hydra/launcher", "hydra.launcher")


def run_isolated(cfg: DictConfig, script: Path) -> float:
    """Run one job of a sweep as `python script ... hydra.mode=RUN`.

    Args:
        cfg: The job's configuration.
        script: The program to start.

    Returns:
        The last validation accuracy; NaN when the job failed, so that the sweep goes on.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    status = _run(_command(cfg, script, folder), environment)
    result = read_result(folder)
    if status != 0 and result.get("status") != "failed":
        ResultFile(folder, describe_job(cfg)).fail(_reason(status))
    elif status < 0:  # killed: the child's own note says only that it had not finished
        ResultFile(folder, {**describe_job(cfg), **_facts(result)}).fail(_reason(status))
    metrics = result.get("metrics")
    accuracy = metrics.get("val/acc") if status == 0 and isinstance(metrics, dict) else None
    return float("nan") if accuracy is None else float(accuracy)


def _command(cfg: DictConfig, script: Path, folder: Path) -> list[str]:
    hydra = HydraConfig.get()
    sources = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    config_dir = ["--config-dir", sources[0]] if sources else []
    own = [
        text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(_OF_THE_SWEEP)
    ]
    # One sweep is one group in W&B, unless the user named another.
    ungrouped = "group" in cfg.logger and OmegaConf.select(cfg, "logger.group") is None
    group = [f"logger.group={quote_value(folder.parent.name)}"] if ungrouped else []
    return [
        sys.executable,
        str(script),
        "--config-name",
        str(hydra.job.config_name),
        *config_dir,
        *hydra.overrides.task,
        *group,
        *own,
        "hydra.mode=RUN",
        f"hydra.run.dir={quote_value(str(folder))}",
        f"hydra.job.num={hydra.job.num}",
    ]


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    # A session of its own: Ctrl-C reaches the job once, through us, and `_stop` gets the job's
    # children too.
    job = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        with _exit_on_sigterm():
            return job.wait()
    except BaseException:
        _stop(job)
        raise


def _stop(job: subprocess.Popen[bytes]) -> None:
    _signal_group(job, signal.SIGINT)
    try:
        job.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        _signal_group(job, signal.SIGKILL)
        job.wait()


def _signal_group(job: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(job.pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a job does not outlive its sweep."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(_TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _reason(status: int) -> str:
    if status < 0:
        return f"the job's process was killed by {signal.Signals(-status).name}"
    return f"the job's process ended with status {status} before it could say why"


def _facts(result: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in result.items() if key not in ("status", "error")}
