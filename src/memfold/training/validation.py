"""When a run validates: where the Trainer's options say so, and wherever weights are kept."""

from lightning.pytorch import Callback, LightningModule, Trainer

from memfold.processes.lightning_internals import (
    can_stop_early,
    validates_now,
    validates_too,
)

__all__ = ["KeptWeightsValidation", "is_followed_by_a_step"]


class KeptWeightsValidation(Callback):
    """Validate the last weights of the training, and of every epoch that is validated at all.

    Left alone, Lightning validates where `check_val_every_n_epoch` and `val_check_interval` say so
    and nowhere else. A run would end, and save its best checkpoint, with metrics of weights that
    it no longer has.
    """

    def __init__(self) -> None:
        self._step: int | None = None

    def is_up_to_date(self, trainer: Trainer) -> bool:
        """Tell whether `trainer` has validated the weights that its training has ended with."""
        return self._step == trainer.global_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add to the places where Lightning validates."""
        if stage == "fit":
            validates_too(trainer, lambda: trainer.enable_validation and _keeps_weights(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which weights the metrics are of."""
        if not trainer.sanity_checking:
            self._step = trainer.global_step


def is_followed_by_a_step(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether no validation and no epoch's end comes first.

    A checkpoint that is written before those resumes after them: they would be missing.
    """
    return not (trainer.is_last_batch or _is_over(trainer) or validates_now(trainer))


def _keeps_weights(trainer: Trainer) -> bool:
    every = trainer.check_val_every_n_epoch
    is_validated_epoch = every is None or (trainer.current_epoch + 1) % every == 0
    return (trainer.is_last_batch and is_validated_epoch) or _is_over(trainer)


def _is_over(trainer: Trainer) -> bool:
    """Tell whether no optimizer step follows the last one."""
    max_epochs, is_last_batch = trainer.max_epochs, trainer.is_last_batch
    is_last_epoch = max_epochs is not None and trainer.current_epoch + 1 >= max_epochs
    is_stopped = trainer.should_stop and can_stop_early(trainer)
    return (
        0 <= trainer.max_steps <= trainer.global_step
        or (is_last_batch and is_last_epoch)
        or is_stopped
    )
