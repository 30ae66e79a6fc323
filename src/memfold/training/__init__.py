"""From a configuration to a run folder.

Importing this package is cheap (`train.py --help` does it); torch and Lightning are imported when
a job starts.
"""

import importlib
from typing import TYPE_CHECKING, Any

from memfold.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from memfold.training.load import load_model, read_data
    from memfold.training.predictor import Predictor

__all__ = ["Predictor", "load_model", "read_data", "run"]
_MODULES = {"Predictor": "predictor", "load_model": "load", "read_data": "load"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(cfg: "DictConfig") -> dict[str, Any]:
    """Train, test and save what `cfg` describes, in Hydra's output folder.

    Hydra's configuration must be set (`HydraConfig`), as it is inside `@hydra.main`.

    Returns:
        What `result.json` holds.

    Raises:
        InputError: The user can put it right; the message is one line.
    """
    try:
        from memfold.training.job import run_job
    except (ImportError, RuntimeError) as error:
        # torchmetrics, and so Lightning, imports torchvision wherever it finds one.
        if "torchvision" not in str(error):
            raise
        raise InputError(
            f"the torchvision that is installed does not fit this PyTorch ({error}): memfold needs "
            "none (pip uninstall torchvision), or install the build that belongs to it"
        ) from error
    return run_job(cfg)
