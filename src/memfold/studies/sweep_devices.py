"""Several jobs at once on one machine: each that wants one GPU gets the one with fewest jobs."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.runs.locks import try_lock

__all__ = ["device_slot", "name_visible_devices", "num_parallel_jobs"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS_BETWEEN_LOOKS = 0.2


def num_parallel_jobs(launcher: Mapping[str, Any]) -> int:
    """Return how many jobs joblib runs at once; 1 with every other launcher.

    Raises:
        InputError: It is none at all.
    """
    n_jobs = launcher.get("n_jobs")
    if n_jobs is None:
        return 1
    if n_jobs == 0:
        raise InputError("hydra.launcher.n_jobs=0: 1 or more jobs at once, or -1 for one per core")
    from joblib import effective_n_jobs

    return effective_n_jobs(int(n_jobs))


def name_visible_devices(config: DictConfig) -> None:
    """Set `CUDA_VISIBLE_DEVICES` to all GPUs, for the processes that will share them out.

    What the user has set stays. Without a GPU, or with one job at a time, nothing is set.
    """
    is_cpu = OmegaConf.select(config, "trainer.accelerator") == "cpu"
    if _VISIBLE in os.environ or is_cpu or num_parallel_jobs(config.hydra.launcher) == 1:
        return
    import torch

    if torch.cuda.device_count() > 1:
        os.environ[_VISIBLE] = ",".join(map(str, range(torch.cuda.device_count())))


@contextmanager
def device_slot(sweep: Path, cfg: DictConfig, num_jobs: int) -> Iterator[str | None]:
    """Reserve a GPU for a job that wants one, as long as the block runs.

    Args:
        sweep: The sweep's folder, where the kernel keeps the locks of this machine's processes.
        cfg: The job's configuration.
        num_jobs: How many jobs run at once.

    Returns:
        What `CUDA_VISIBLE_DEVICES` shall be; `None` to leave it as it is.

    Raises:
        InputError: The folder cannot be written.
    """
    devices = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    wants_one = str(OmegaConf.select(cfg, "trainer.devices")) == "1"
    is_cpu = OmegaConf.select(cfg, "trainer.accelerator") == "cpu"
    if num_jobs == 1 or len(devices) < 2 or not wants_one or is_cpu:
        yield None
        return
    folder = sweep / ".sweep" / "devices"
    # A second job comes to a GPU when each has one.
    rounds = range(-(-num_jobs // len(devices)))
    slots = [
        (place, folder / f"{place}_{turn}") for turn in rounds for place in range(len(devices))
    ]
    while True:
        for place, file in slots:
            with try_lock(file) as is_free:
                if is_free:
                    yield devices[place]
                    return
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # a job that was killed has just left its slot
