"""Early stopping that a resumed run remembers."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

__all__ = ["RunEarlyStopping"]


class RunEarlyStopping(EarlyStopping):
    """Lightning's early stopping, exact to resume: a run that had stopped trains no further.

    Lightning restores the counts, but looks at them after one more epoch, and restores the patience
    over the one that is configured now.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts of the run that is resumed; the patience may have changed."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the run had stopped, and would still."""
        is_patient = self.wait_count < self.patience
        reason = self.stopping_reason
        if reason is EarlyStoppingReason.PATIENCE_EXHAUSTED and is_patient:
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        elif reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
