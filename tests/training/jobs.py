"""Compose and run jobs: in this process, or as a user does."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

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


def start_training(*arguments: str, largest_file: int | None = None) -> subprocess.Popen[str]:
    """Start `train.py` in a process of its own, which can write `largest_file` bytes to a file."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MASTER_"))}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        start_new_session=True,
    )


def train(*arguments: str, largest_file: int | None = None) -> tuple[int, str, str]:
    """Run `train.py`; return its exit status, stdout and stderr."""
    process = start_training(*arguments, largest_file=largest_file)
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the other ranks, too
        raise
    return process.returncode, out, err
