"""Callbacks by which a test looks into every process of a run, or ends one of them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EpochProbe(Callback):
    """Write, for this rank, what each epoch ended with."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._epochs: list[dict[str, float]] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = self._folder / f"epochs_{trainer.global_rank}.json"
        file.write_text(json.dumps(self._epochs))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self._epochs.append({"epoch": trainer.current_epoch, **metrics})


class EndRank(Callback):
    """Kill one rank of a run, or let it raise, at one place."""

    def __init__(self, rank: int, place: str, how: str, marker: str) -> None:
        """Remember where.

        Args:
            rank: The rank that ends.
            place: init (before the ranks know each other), setup, fit or test.
            how: kill or raise.
            marker: A file that appears just before.
        """
        self._rank = rank
        self._place = place
        self._how = how
        self._marker = Path(marker)
        self._end("init")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end("setup")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self._end("fit")

    def on_test_batch_start(self, *_: Any) -> None:
        self._end("test")

    def _end(self, place: str) -> None:
        own = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
        if (own, place) != (self._rank, self._place):
            return
        self._marker.touch()
        if self._how == "raise":
            raise RuntimeError("on purpose")
        os.kill(os.getpid(), signal.SIGKILL)
