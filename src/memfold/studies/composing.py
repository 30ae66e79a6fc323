"""Runs of `train.py` and jobs of a sweep, composed as Hydra does before the first one starts."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.overrides import quote_value
from memfold.training.instantiate import instantiate
from memfold.training.user_errors import describe_error

__all__ = [
    "compose_run",
    "composed_job",
    "group_in_wandb",
    "meaning",
    "prepare_data",
]

_CONFIG = "train"
_one_meaning = threading.RLock()


def compose_run(conf: Path, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the configuration of a run; no value is looked at.

    Args:
        conf: The configuration folder of `train.py`.
        overrides: Of one run, as on the command line.
        with_hydra: Whether Hydra's own part stays in.

    Raises:
        InputError: A group, a choice or a key is unknown.
    """
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3", job_name=_CONFIG):
            return compose(_CONFIG, list(overrides), return_hydra_config=with_hydra)
    # Hydra has bare errors, too, of a group with a number in place of a name.
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(describe_error(error)) from error


def group_in_wandb(run: DictConfig, group: str, job_type: str | None) -> list[str]:
    """Return the overrides that make the runs of a study one group in W&B.

    Args:
        run: The configuration of one; what the user has named there stays.
        group: The name of the group.
        job_type: What the run does in it; `None` for an ordinary one.
    """
    names = {"group": quote_value(group), "job_type": job_type}
    return [
        f"logger.{key}={name}"
        for key, name in names.items()
        if name is not None and run.logger.get(key, "no logger of W&B") is None
    ]


@contextmanager
def composed_job(config: DictConfig, number: int, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """Compose a job of a sweep as Hydra does; in the block, `${hydra:...}` means that job.

    Args:
        config: The sweep's configuration, with Hydra's.
        number: Of the job.
        overrides: Of the job.

    Raises:
        HydraException, OmegaConfBaseException: An override or `hydra.sweep.subdir` is wrong.
    """
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
        job.hydra.job.id = str(number)
    with meaning(job):
        folder = os.path.join(job.hydra.sweep.dir, job.hydra.sweep.subdir)
        with open_dict(job):
            job.hydra.runtime.output_dir = os.path.abspath(folder)
        yield job


@contextmanager
def meaning(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}`, of which there is one in a process, mean a configuration."""
    instance: Any = HydraConfig.instance()
    with _one_meaning:
        before = instance.cfg
        instance.cfg = config
        try:
            yield
        finally:
            instance.cfg = before


def prepare_data(runs: Iterable[DictConfig]) -> None:
    """Find the files of all data sets, or download them, before several runs do so at once.

    Args:
        runs: Their configurations.

    Raises:
        InputError: Files are missing and cannot be downloaded, or an option is wrong.
    """
    prepared: list[dict[str, Any]] = []
    for run in runs:
        try:
            options: Any = OmegaConf.to_container(run.data, resolve=True)
        except OmegaConfBaseException:
            continue  # of what a run alone knows, such as ${hydra:runtime.cwd}; it will say so
        if options not in prepared:
            instantiate(options, "data").prepare_data()
            prepared.append(options)
