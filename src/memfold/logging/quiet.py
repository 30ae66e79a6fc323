"""Keep advertisements and known non-problems of the libraries off the screen."""

import logging
import warnings

__all__ = ["hush_libraries"]

_HARMLESS = (
    # Batches are cut from tensors in memory: there is nothing for workers to do.
    r".*does not have many workers.*",
    # Every logged value at the end of an epoch is logged per epoch.
    r".*is smaller than the logging interval.*",
    # The data modules shard evaluation without repeating samples.
    r".*it is recommended to use `Trainer\(devices=1, num_nodes=1\)`.*",
    # A resumed run finds its own folder.
    r".*Checkpoint directory .* exists and is not empty.*",
    # One GPU among several was asked for on purpose.
    r".*GPU available but not used.*",
    # GradScaler skips the first step of fp16 training while it looks for its scale.
    r".*Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`.*",
    r".*isinstance\(treespec, LeafSpec\).*",
)


def hush_libraries() -> None:
    """Raise Lightning's console level to warnings and filter those that are harmless here."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A target that cannot be found: the error that is raised says the same in one line.
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # a full disk is reported once, not per line of the log
    for pattern in _HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)
    warnings.formatwarning = _one_line


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    # Where in the source a warning arose tells its reader nothing.
    return f"warning: {' '.join(str(message).split())}\n"
