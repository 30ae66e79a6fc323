"""Overrides, checked before many runs fail of the same mistake."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.training.command_line import describe_error

__all__ = ["check_overrides"]

_CONFIG = "train"


def check_overrides(conf: Path, overrides: Sequence[str]) -> None:
    """Compose a configuration of `train.py`; no value is looked at.

    Args:
        conf: Its configuration folder.
        overrides: Of one run, as on the command line.

    Raises:
        InputError: A group, a choice or a key is unknown.
    """
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3", job_name=_CONFIG):
            compose(_CONFIG, list(overrides))
    # ValueError: a group with a number in place of a name.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(describe_error(error)) from error
