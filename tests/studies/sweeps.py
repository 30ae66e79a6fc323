"""Start sweeps of the small program in `sweep_stand_in.py`, and look at what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from memfold.runs.folder import SWEEP_PLAN
from memfold.runs.sweep import SweepPlan
from training.forked import Script

STAND_IN = Path(__file__).with_name("sweep_stand_in.py")


def write_plan(folder: Path, arguments: list[str], *jobs: list[str]) -> None:
    """Leave what a sweep writes down first."""
    plan = SweepPlan(command="python train.py", arguments=arguments, jobs=list(jobs), attempt=1)
    plan.write(folder / SWEEP_PLAN)


def start_sweep(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a sweep in a process group of its own, as a shell does.

    Args:
        folder: The sweep's; not given to it when `arguments` name one.
        arguments: Overrides.
        environment: More variables.
    """
    command, cwd, variables = _command(folder, arguments, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a sweep, forked from a server; return its exit status, stdout and stderr."""
    return Script(*_command(folder, arguments, environment)).finish()


def finish(process: subprocess.Popen[str], seconds: float = 200.0) -> tuple[int, str, str]:
    """Wait for a sweep; return its exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def _command(
    folder: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> tuple[list[str], Path, dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    has_folder = any(text.startswith(("sweep.resume=", "hydra.sweep.dir=")) for text in arguments)
    where = [] if has_folder else [f"hydra.sweep.dir={folder}"]
    return [str(STAND_IN), "-m", *arguments, *where], Path.cwd(), {**kept, **environment}


def let(folder: Path, job: int, behaviour: str) -> None:
    """Tell a job of the small program what to do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job}.do").write_text(behaviour)


def seen(folder: Path, job: int) -> list[dict]:
    """Return what each process of a job found: arguments and variables."""
    lines = (folder / str(job) / "seen.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def statuses(folder: Path) -> dict[str, str]:
    """Return the status of every job that has a result."""
    return {
        file.parent.name: json.loads(file.read_text())["status"]
        for file in sorted(folder.glob("*/result.json"))
    }


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that have a folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in text for text in process.info["cmdline"] or ()):
            found.append(process)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Fail unless `condition` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
