"""From a configuration to a run folder.

Importing this package is cheap (`train.py --help` does it); torch and Lightning are imported when
a job starts.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["run"]


def run(cfg: "DictConfig") -> dict[str, object]:
    """Train, test and save what `cfg` describes, in Hydra's output folder.

    Hydra's configuration must be set (`HydraConfig`), as it is inside `@hydra.main`.

    Returns:
        What `result.json` holds.

    Raises:
        InputError: The user can put it right; the message is one line.
    """
    from memfold.training.job import run_job

    return run_job(cfg)
