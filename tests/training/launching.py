"""Start the processes of one run as torchrun and srun do."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from training.jobs import PYTHONPATH, REPOSITORY

TRAIN = str(REPOSITORY / "train.py")
_OF_LAUNCHERS = ("WANDB_", "MASTER_", "SLURM_", "TORCHELASTIC_", "GROUP_", "PL_GLOBAL_SEED")
_OF_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's variables without those of any launcher, and `variables`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_OF_LAUNCHERS) and key not in _OF_RANKS
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH} | variables


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    folder: Path, *command: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `command` in `folder`, as a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=clean_environment() if environment is None else environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_torchrun(folder: Path, *arguments: str, options: Iterable[str]) -> subprocess.Popen[str]:
    """Start `torchrun OPTIONS train.py ARGUMENTS`."""
    command = (sys.executable, "-m", "torch.distributed.run", *options, TRAIN, *arguments)
    return start(folder, *command)


def slurm_variables(rank: int, num_tasks: int, num_nodes: int = 1) -> dict[str, str]:
    """Return what srun sets for a task, and a port that is free on this machine."""
    per_node = num_tasks // num_nodes
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "memfold",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_NNODES": str(num_nodes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_NODELIST": "127.0.0.1",
    }


def start_slurm_tasks(folder: Path, *arguments: str, num_nodes: int) -> list[subprocess.Popen[str]]:
    """Start two tasks as srun does."""
    port = str(free_port())
    return [
        start(
            folder,
            sys.executable,
            TRAIN,
            *arguments,
            environment=clean_environment(
                MASTER_PORT=port, **slurm_variables(rank, num_tasks=2, num_nodes=num_nodes)
            ),
        )
        for rank in range(2)
    ]


def finish(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str, str]:
    """Wait for the end; return exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err
