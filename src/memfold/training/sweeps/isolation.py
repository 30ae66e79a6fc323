"""Each job of a sweep in its own process.

Lightning's DDP launcher starts the program again with the same arguments, which replays the whole
sweep in every child, and it leaves environment variables behind that spoil the next job. A process
of its own gives each job clean variables, memory statistics and loggers, and a job that dies takes
no other with it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.overrides import quote_value, unresolved
from memfold.processes.ranks import LAUNCHER_VARIABLES, declare_parent, is_rank_zero
from memfold.runs.folder import LOCK, read_result, writing
from memfold.runs.result import UNFINISHED, ResultFile, describe_job

__all__ = ["CONSOLE", "SECONDS_TO_STOP", "job_environment", "run_isolated"]

CONSOLE = "console.log"
SECONDS_TO_STOP = {signal.SIGINT: 30.0, signal.SIGTERM: 130.0}
"""Until a job is killed. After SIGTERM it saves a checkpoint, for which it gives itself 120 s."""
_SECONDS_BETWEEN_LOOKS = 0.3
_SECONDS_TO_FOLLOW = 5.0
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
_OF_A_CLUSTER = ("SLURM_", "SUBMITIT_")


def run_isolated(
    cfg: DictConfig,
    script: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    wanted_stop: Callable[[], signal.Signals | None] = lambda: None,
) -> None:
    """Run one job of a sweep as `python script ... hydra.mode=RUN`.

    What it prints goes to `console.log` in its folder. However it ends, its `result.json` says how.

    Args:
        cfg: The job's configuration.
        script: The program to start.
        resume: Whether to continue the run in the job's folder, or to start it anew if its
            checkpoint is damaged.
        device: The GPU that the job sees; `None` for all.
        wanted_stop: Asked again and again, and returns a signal when the job shall get it and end.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    environment = job_environment(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = _command(cfg, script, folder)
    again = [f"resume={quote_value(str(folder))}"] if resume else []
    name = CONSOLE if is_rank_zero() else f"console_{os.environ.get('SLURM_PROCID')}.log"
    status, printed = _run([*command, *again], environment, folder / name, wanted_stop)
    is_damaged = status > 0 and _DAMAGED.search(printed) is not None
    if resume and is_damaged and not _is_one_of_several_tasks(os.environ):
        _remove_run(folder)
        status, _ = _run(command, environment, folder / name, wanted_stop)
    result = read_result(folder)
    is_explained = result.get("status") == "failed" and result.get("error") != UNFINISHED
    if status < 0 or (status > 0 and not is_explained):
        ResultFile(folder, {**describe_job(cfg), **_facts(result)}).fail(_reason(status))


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for the process of a job.

    A SLURM job of several tasks is one run over all of them: Lightning finds its ranks in SLURM's
    variables. In any other case they would be taken for that by mistake, and so would those which
    Lightning's launcher has left behind.

    Args:
        environment: The variables of this process.
    """
    if _is_one_of_several_tasks(environment):
        kept = dict(environment)
    else:
        kept = {
            name: value
            for name, value in environment.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith(_OF_A_CLUSTER)
        }
    declare_parent(kept)
    return kept


def _is_one_of_several_tasks(environment: Mapping[str, str]) -> bool:
    is_submitted = environment.get("SUBMITIT_EXECUTOR") == "slurm"
    return is_submitted and int(environment.get("SLURM_NTASKS") or "1") > 1


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
        sys.executable,
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


def _run(
    command: Sequence[str],
    environment: dict[str, str],
    console: Path,
    wanted_stop: Callable[[], signal.Signals | None],
) -> tuple[int, str]:
    """Return the exit status and what the process has printed."""
    with writing(console):
        output = console.open("ab")
    start = output.tell()
    with output, _noting_sigterm() as received:
        # A session of its own: Ctrl-C reaches the job once, through us, and `_stop` gets the job's
        # children too.
        job = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    status = job.wait(_SECONDS_BETWEEN_LOOKS)
                    break
                except subprocess.TimeoutExpired:
                    number = received[0] if received else wanted_stop()
                    if number is not None:
                        status = _stop(job, number)
                        break
        except BaseException as error:  # the scheduler's plugin ends this process with SystemExit
            _stop(job, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            raise
    if status < 0:
        _end_followers(job)
    return status, console.read_bytes()[start:].decode(errors="replace")


def _stop(job: subprocess.Popen[bytes], number: signal.Signals) -> int:
    try:
        _signal_group(job, number)
        return job.wait(SECONDS_TO_STOP[number])
    except subprocess.TimeoutExpired:
        return _kill(job)
    except BaseException:  # Ctrl-C once more
        _kill(job)
        raise


def _kill(job: subprocess.Popen[bytes]) -> int:
    _signal_group(job, signal.SIGKILL)
    return job.wait()


def _end_followers(job: subprocess.Popen[bytes]) -> None:
    """The first process of the job was killed: the next job is to find no others of it."""
    deadline = time.monotonic() + _SECONDS_TO_FOLLOW
    while _signal_group(job, None) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _signal_group(job, signal.SIGKILL)


def _signal_group(job: subprocess.Popen[bytes], number: signal.Signals | None) -> bool:
    """Send a signal, or none, to what is left of a job; tell whether anything is."""
    try:
        os.killpg(job.pid, number or 0)
    except ProcessLookupError:
        return False
    return True


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


def _reason(status: int) -> str:
    if status < 0:
        return f"the job's process was killed by {signal.Signals(-status).name}"
    return f"the job's process ended with status {status} before it could say why"


def _facts(result: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in result.items() if key not in ("status", "error")}
