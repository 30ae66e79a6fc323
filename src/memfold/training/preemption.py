"""A run that is asked to give way stops at a step, with a checkpoint, and can be resumed.

While a network is trained SIGTERM is only noted. All ranks stop at the same step, or at the end
of the validation that runs, and save `last.ckpt` there.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from memfold.processes.lightning_internals import ignore_sigterm, raise_as_for_sigterm
from memfold.processes.termination import Termination
from memfold.runs.folder import LAST_CHECKPOINT
from memfold.training.validation import is_followed_by_a_step

__all__ = ["Preemption"]


class Preemption(Checkpoint):
    """Stop a Trainer at a step that all ranks agree on, with a checkpoint of it.

    It comes last of all callbacks, when whatever belongs to a step is done.
    """

    def __init__(self, termination: Termination, folder: Path, trainer: Trainer) -> None:
        """Take the place of Lightning's handling in `trainer`.

        Args:
            termination: Of this process.
            folder: The run folder.
            trainer: Not yet in use.
        """
        self._termination = termination
        self._path = folder / LAST_CHECKPOINT
        self._pending: Tensor | None = None
        self._last_step = 0
        self._is_agreed = False
        ignore_sigterm(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on wait for the end of a step."""
        self._last_step = trainer.global_step
        self._termination.is_deferred = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop after an optimizer step, unless a validation or the end of an epoch follows."""
        self._is_agreed = self._is_agreed or self._agree(trainer)
        has_stepped = trainer.global_step > self._last_step  # not while gradients are summed up
        self._last_step = trainer.global_step
        if self._is_agreed and has_stepped and is_followed_by_a_step(trainer):
            trainer.save_checkpoint(self._path)
            raise_as_for_sigterm(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch."""
        self._pending = None
        requested = self._termination.is_requested
        if trainer.strategy.reduce_boolean_decision(requested, all=False):
            trainer.save_checkpoint(self._path)
            raise_as_for_sigterm(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on end at once."""
        self._termination.is_deferred = False
        self._termination.obey()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Training is over; another failure is not to be hidden by a signal that comes now."""
        self._termination.is_deferred = False

    def _agree(self, trainer: Trainer) -> bool:
        """Tell whether any rank had been signalled at the step before, without a pause for it."""
        requested = self._termination.is_requested
        if trainer.world_size == 1:
            return requested
        before = self._pending
        flag = torch.full((), float(requested), device=trainer.strategy.root_device)
        self._pending = trainer.strategy.reduce(flag, reduce_op="sum")  # pyright: ignore
        return before is not None and before.item() > 0
