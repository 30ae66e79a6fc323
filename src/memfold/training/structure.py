"""The strategy's part in training: its updates at optimizer steps, and what it logs."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

import memfold
from memfold.compression import Compression, compression_of, prepare_step
from memfold.training.distributed import whole_parameters

__all__ = ["Structure"]


class Structure(Callback):
    """Give the strategy its turn before every optimizer step, and log what it did.

    Ranks compress on their own before they know each other; here they take over the structure of
    rank 0, in case rounding made a data-informed score decide otherwise.
    """

    def __init__(self, example: Tensor) -> None:
        """Remember what a batch of inputs looks like, for the health of masks."""
        self._example = example
        self._seen_version: int | None = None
        self._logged: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the structure, before DDP and the optimizer know the parameters."""
        compression = compression_of(_network(pl_module))
        if stage == "fit" and compression is not None and trainer.world_size > 1:
            compression.adopt(trainer.strategy.broadcast(compression.structure()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the first step, after a checkpoint has been restored; log the structure."""
        net = _network(pl_module)
        compression, total = compression_of(net), int(trainer.estimated_stepping_batches)
        prepare_step(net, step=trainer.global_step, total_steps=total)
        # In the middle of an epoch, one that changes with every step is not what was logged last.
        is_resumed = self._logged is not None
        if compression is not None and not (is_resumed and compression.logged == "epochs"):
            self._log(trainer, compression, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the strategy look at complete gradients; see `memfold.before_step`."""
        total = int(trainer.estimated_stepping_batches)
        net = _network(pl_module)
        memfold.before_step(net, optimizer, step=trainer.global_step, total_steps=total)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the structure after a change."""
        compression = compression_of(_network(pl_module))
        if compression is None or compression.logged != "changes":
            return
        if compression.structure_version != self._seen_version:
            self._log(trainer, compression, trainer.global_step - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a structure that changes with every step, as that of `supermask` does."""
        compression = compression_of(_network(pl_module))
        if compression is not None and compression.logged == "epochs":
            self._log(trainer, compression, trainer.global_step - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the weights that were kept from one validation batch to the next."""
        compression = compression_of(_network(pl_module))
        if compression is not None:
            compression.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged last: a resumed run does not log it again."""
        return {"logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the run that is resumed has logged."""
        self._logged = state_dict["logged"]

    def _log(self, trainer: Trainer, compression: Compression, step: int) -> None:
        """Log under the step that made the change, as Lightning does: its counter is past it."""
        if compression.logged == "never":
            return
        self._seen_version = compression.structure_version
        digest = _digest(compression.index_tensors())
        if digest == self._logged:
            return
        self._logged = digest
        with whole_parameters(trainer):
            if trainer.is_global_zero:
                metrics = compression.metrics(self._example)
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=step)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    whole = blake2b(digest_size=16)
    for name in sorted(tensors):
        whole.update(tensors[name].cpu().numpy().tobytes())
    return whole.hexdigest()


def _network(task: LightningModule) -> nn.Module:
    net = task.net
    assert isinstance(net, nn.Module)
    return net
