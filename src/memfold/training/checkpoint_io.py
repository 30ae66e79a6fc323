"""Checkpoints that are there in full or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from memfold.training.run_folder import writing

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, then rename.

    A run that is killed while it saves keeps the checkpoint that it had, and one that runs out of
    disk space leaves no partial file behind.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Save `checkpoint` to the local file `path`.

        Raises:
            InputError: The file cannot be written; `path` is then what it was.
        """
        path = Path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(checkpoint, path)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    # One name for all attempts: what a killed run left is overwritten, not collected.
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch closes its archive after a failed write, which fails again.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
