"""What stands in the way of many runs, found before the first one starts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.training.instantiate import instantiate
from memfold.training.user_errors import describe_error

__all__ = ["compose_run", "parse_overrides", "prepare_data"]

_CONFIG = "train"


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Read overrides as Hydra does.

    Raises:
        InputError: Hydra cannot.
    """
    try:
        return OverridesParser.create().parse_overrides(list(texts))
    except HydraException as error:
        raise InputError(describe_error(error)) from error


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
