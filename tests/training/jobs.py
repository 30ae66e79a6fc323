"""Compose and run jobs: in this process, or as a user does."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from training.forked import Script

REPOSITORY = Path(__file__).parents[2]
TESTS = REPOSITORY / "tests"
PYTHONPATH = os.pathsep.join([str(REPOSITORY / "src"), str(TESTS)])
"""For programs that tests start: they import what stands here, whatever is installed."""

# An MLP on the embedded digits: a second or two with everything around it.
SMALL = ("backbone=mlp", "logger=csv", "trainer=cpu", "~callbacks.progress_bar")


def compose_job(
    folder: Path, *overrides: str, number: int = 0, hydra_overrides: Sequence[str] = ()
) -> DictConfig:
    """Compose the configuration of a job in `folder`, and set Hydra's own as in `train.py`.

    A new run leaves its `.hydra`, as Hydra does.
    """
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3", job_name="train"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder)
        cfg.hydra.job.num = number
        cfg.hydra.overrides.hydra = list(hydra_overrides)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        task = cfg.copy()
        del task["hydra"]
    if task.resume is None:
        (folder / ".hydra").mkdir(exist_ok=True)
        (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(task))
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return task


def training_environment() -> dict[str, str]:
    """Return the variables for a run, without those of launchers and of W&B."""
    of_launchers = ("WANDB_", "MASTER_")
    of_ranks = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(of_launchers) and name not in of_ranks
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}


def start_training(*arguments: str) -> subprocess.Popen[str]:
    """Start `train.py` in a new Python."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        cwd=REPOSITORY,
        env=training_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(*arguments: str) -> tuple[int, str, str]:
    """Run `train.py` in a new Python; return its exit status, stdout and stderr."""
    process = start_training(*arguments)
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the other ranks, too
        raise
    return process.returncode, out, err


def train_forked(*arguments: str, largest_file: int | None = None) -> tuple[int, str, str]:
    """Run `train.py` without its imports; it can write `largest_file` bytes to a file."""
    command = [str(REPOSITORY / "train.py"), *arguments]
    return Script(command, REPOSITORY, training_environment(), largest_file).finish()
