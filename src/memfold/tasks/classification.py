"""Image classification."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from memfold.compression import clip_grad_norm_, extra_loss
from memfold.errors import InputError
from memfold.tasks.distillation import Distillation

__all__ = ["Classification"]

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]


class Classification(LightningModule):
    """Cross-entropy and top-1 accuracy of any network that maps images to logits.

    With a teacher, the training loss is a mixture of the cross-entropy and the distillation loss.
    Metrics are means over all images of an epoch and over all ranks.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        num_classes: int,
        label_smoothing: float,
        distillation: Distillation | None = None,
    ) -> None:
        """Take over a network that is ready to be trained.

        Args:
            net: Images (B, C, H, W) to logits (B, num_classes).
            optimizer: Parameters -> optimizer.
            scheduler: (optimizer, total_steps=, steps_per_epoch=) -> scheduler, which is stepped
                after every optimizer step.
            num_classes: Number of classes.
            label_smoothing: Share of the target spread over all classes, in [0, 1); in the
                training loss only.
            distillation: The teacher, in training only; it stays outside of this module.

        Raises:
            InputError: `label_smoothing` is out of range.
        """
        super().__init__()
        is_number = isinstance(label_smoothing, int | float)
        if not is_number or isinstance(label_smoothing, bool) or not 0.0 <= label_smoothing < 1.0:
            raise InputError(
                f"task.label_smoothing must be a number in [0, 1), got {label_smoothing!r}"
            )
        # Plain values: anything else would make the checkpoint a pickle.
        self.save_hyperparameters(
            {"num_classes": num_classes, "label_smoothing": label_smoothing}, logger=False
        )
        self.net = net
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._label_smoothing = label_smoothing
        self._distillation = distillation
        self.directions: Mapping[str, str] = {
            "train/loss": "min",
            "train/acc": "max",
            "val/loss": "min",
            "val/acc": "max",
            **({} if distillation is None else {"train/distill_loss": "min"}),
        }
        """What is logged in training, and which way is better."""
        self.metric_prefix = ""
        """Before the names of all metrics, when a variant of the network is evaluated."""
        self.accuracy = nn.ModuleDict(
            {
                f"{split}_accuracy": MulticlassAccuracy(
                    num_classes, average="micro", validate_args=False
                )
                for split in ("train", "val", "test")
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of `images` (B, C, H, W)."""
        return self.net(images)

    def on_train_epoch_start(self) -> None:
        """Log the learning rate of the epoch's first step."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, C, H, W) and labels (B,).

        The strategy's own term is part of it, and not of `train/loss`, which is like `val/loss`.
        """
        loss = self._step("train", batch, self._label_smoothing, self._distillation)
        return loss + extra_loss(self.net)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count loss and accuracy on the validation split."""
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count loss and accuracy on the test set."""
        self._step("test", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer for everything trainable, and its schedule."""
        optimizer = self._optimizer(_trainable(self.net))
        trainer = self.trainer
        total = trainer.estimated_stepping_batches  # it loads what the next line counts
        if total == math.inf:
            epochs = trainer.max_epochs
            raise InputError(f"trainer.max_epochs must be a whole number above 0, got {epochs!r}")
        # Not total / epochs: `max_steps` may end the training in the first of them.
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        scheduler = self._scheduler(optimizer, total_steps=int(total), steps_per_epoch=per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that the dense model's gradient would have; see `clip_grad_norm_`."""
        if gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm"):
            clip_grad_norm_(self.net, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which teacher the run has: one that is resumed must have the same."""
        if self._distillation is not None:
            checkpoint["teacher"] = self._distillation.fingerprint

    def _step(
        self,
        split: str,
        batch: Batch,
        label_smoothing: float = 0.0,
        distillation: Distillation | None = None,
    ) -> Tensor:
        images, labels = batch
        # Lightning casts a batch before the data module has made numbers of its pixels.
        images = self.trainer.precision_plugin.convert_input(images)
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        # As a float: Lightning rounds the ranks' mean of an integer number of samples down, and
        # divides by that.
        batch_size = float(len(labels))
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": batch_size}
        if distillation is not None:
            distill_loss = distillation.loss(images, logits)
            self.log(f"{split}/distill_loss", distill_loss, sync_dist=True, **options)
            loss = distillation.mix(loss, distill_loss)
        accuracy: Any = self.accuracy[f"{split}_accuracy"]
        with torch.no_grad():
            accuracy.update(logits, labels)
        name = f"{self.metric_prefix}{split}"
        self.log(f"{name}/loss", loss, sync_dist=True, prog_bar=split == "train", **options)
        self.log(f"{name}/acc", accuracy, prog_bar=split == "val", **options)
        return loss


def _trainable(net: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in net.parameters() if parameter.requires_grad)
