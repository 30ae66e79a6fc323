"""The training metrics of an epoch, when the run is interrupted in it or right after it.

Lightning sums them up in memory, saves nothing of them, and writes their row after the checkpoint
of the epoch. So a checkpoint here holds the sums so far of every rank, or the row.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities import dim_zero_sum

from memfold.logging.loggers import MetricsFile
from memfold.processes.lightning_internals import (
    forget_computed,
    last_logged_row,
    logged_values,
    reductions_of,
)

__all__ = ["CHECKPOINT_KEY", "EpochMetrics"]

CHECKPOINT_KEY = "epoch_metrics"

Sums = dict[str, dict[str, Tensor]]
"""What is logged -> its state -> (W, ...) tensor, one entry per rank."""


class EpochMetrics(Callback):
    """Give a resumed epoch the metrics of its first part, and `metrics.csv` every epoch's row.

    Means over batches and metrics that are sums over samples are restored, exactly with as many
    ranks as before, else up to the order of summation. Others cover what was left of the epoch.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}
        self._is_over = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the checkpoint has until training starts."""
        self._saved = checkpoint.get(CHECKPOINT_KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row that a kill may have kept from the file; log what no step logs."""
        row = self._saved.pop("row", None)
        if row is not None and trainer.is_global_zero:
            _log_unless_there(trainer, row, self._saved.pop("step"))
        for name, value in self._saved.pop("once", {}).items():
            pl_module.log(name, value, sync_dist=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that there is an unfinished epoch."""
        self._is_over = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the sums to those of the first step of the resumed part."""
        saved: Sums = self._saved.pop("sums", {})
        for key, item in _items(trainer) if saved else ():
            metric = item if item.is_tensor else item.value
            for name, value in saved.get(key, {}).items():
                if name not in metric.metric_state:
                    continue  # what an earlier version has counted, too
                total = getattr(metric, name) + _share(value, trainer).to(pl_module.device)
                setattr(metric, name, total)
            forget_computed(metric, item)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is complete."""
        self._is_over = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the row of an epoch that is complete, or the sums of one that is not."""
        if self._is_over:
            row, step = last_logged_row(trainer)
            row["epoch"] = trainer.current_epoch
            checkpoint[CHECKPOINT_KEY] = {"row": row, "step": step}
            return
        sums: Sums = {}
        once: dict[str, Tensor] = {}
        for key, item in _items(trainer):
            if item.meta.fx == "training_step":
                metric = item if item.is_tensor else item.value
                sums[key] = {
                    name: _of_all_ranks(value, trainer)
                    for name, value in metric.metric_state.items()
                }
            elif item.is_tensor:
                once[item.meta.name] = item.value / item.cumulated_batch_size
        checkpoint[CHECKPOINT_KEY] = {"sums": sums, "once": once}


def _items(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Iterate over what is logged per epoch and can be added up."""
    for key, item in logged_values(trainer):
        metric = item if item.is_tensor else item.value
        is_sum = all(f in (torch.sum, dim_zero_sum) for f in reductions_of(metric))
        if item.meta.on_epoch and is_sum and (not item.is_tensor or item.meta.is_mean_reduction):
            yield key, item


def _of_all_ranks(value: Tensor, trainer: Trainer) -> Tensor:
    parts = value.detach().new_zeros(trainer.world_size, *value.shape)
    parts[trainer.global_rank] = value
    return trainer.strategy.reduce(parts, reduce_op="sum")  # pyright: ignore


def _share(values: Tensor, trainer: Trainer) -> Tensor:
    """Return this rank's part; rank 0 has everything when the number of ranks has changed."""
    if len(values) == trainer.world_size:
        return values[trainer.global_rank]
    total = values.sum(dim=0)
    return total if trainer.is_global_zero else torch.zeros_like(total)


def _log_unless_there(trainer: Trainer, row: Mapping[str, float], step: int) -> None:
    files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
    if any(file.has_row(step, row.keys()) for file in files):
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(row), step)
        logger.save()
