"""A network and its task, as Lightning trains them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memfold.compression import clip_grad_norm_, extra_loss
from memfold.data.spec import Table
from memfold.errors import InputError
from memfold.processes.lightning_internals import LightModule
from memfold.tasks.distillation import Distillation
from memfold.tasks.meters import MeanLoss
from memfold.tasks.task import Task, logits_of

__all__ = ["TaskModule"]

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[nn.Module, int], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]


class TaskModule(LightModule):
    """Trains any network by the loss of a task, and measures it by the task's metrics.

    With a teacher, the training loss is a mixture of the task's and the distillation loss. Metrics
    are over all samples, or tokens, of an epoch and over all ranks.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        distillation: Distillation | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        """Take over a network that is ready to be trained.

        Args:
            net: Inputs (B, ...) to a tensor, or an object with `.logits`.
            task: Loss and metrics.
            optimizer: (network, number of its outputs) -> optimizer.
            scheduler: (optimizer, total_steps=, steps_per_epoch=) -> scheduler, which is stepped
                after every optimizer step.
            distillation: The teacher, in training only; it stays outside of this module.
            compiles: Whether the network runs through `torch.compile`, once for each shape of a
                batch; `net` itself, and the names of its tensors, stay as they are.
        """
        super().__init__()
        self.net = net
        self.task = task
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._distillation = distillation
        # With sizes left open, what a batch gives would depend on the sizes seen before.
        self._call = torch.compile(_call, dynamic=False) if compiles else _call
        self.directions = dict(task.directions)
        """What is logged in training, and which way is better."""
        if distillation is not None:
            self.directions["train/distill_loss"] = "min"
        self.metric_prefix = ""
        """Before the names of all metrics, when a variant of the network is evaluated."""
        # Numbers that are codes of categories must not be rounded.
        inputs = task.spec.inputs
        self._casts_inputs = not (isinstance(inputs, Table) and inputs.cardinalities)
        self.meters = nn.ModuleDict()
        for split in ("train", "val", "test"):
            is_taught = distillation is not None and split == "train"
            losses = ("distill_loss", "loss") if is_taught else ("loss",)
            meters = {**{name: MeanLoss() for name in losses}, **task.meters()}
            self.meters[f"{split}_meters"] = nn.ModuleDict(meters)

    def forward(self, inputs: Tensor) -> Any:
        """Return what the network makes of `inputs` (B, ...)."""
        return self._call(self.net, inputs)

    def on_train_epoch_start(self) -> None:
        """Log the learning rate of the epoch's first step."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch (inputs, targets).

        The strategy's own term is part of it, and not of `train/loss`, which is like `val/loss`.
        """
        loss = self._step("train", batch, self._distillation)
        return self._share(batch[1]) * loss + extra_loss(self.net)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch of the test split."""
        self._step("test", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer for everything trainable, and its schedule."""
        optimizer = self._optimizer(self.net, self.task.spec.num_outputs)
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

    def _share(self, targets: Tensor) -> Tensor | float:
        """Weigh the loss so that the mean over ranks is the mean over all that counts in them."""
        if type(self.task).weight is Task.weight or self.trainer.world_size == 1:
            return 1.0
        weight = torch.tensor(self.task.weight(targets), device=self.device)
        return weight / self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")

    def _step(self, split: str, batch: Batch, distillation: Distillation | None = None) -> Tensor:
        inputs, targets = batch
        if self._casts_inputs:
            # Lightning casts a batch before the data module has made numbers of it.
            inputs = self.trainer.precision_plugin.convert_input(inputs)
        output = self(inputs)
        compute = self.task.training_loss if split == "train" else self.task.loss
        loss = compute(output, targets)
        logits = logits_of(output)
        losses = {"loss": loss}
        if distillation is not None:
            distill_loss = distillation.loss(
                inputs, logits, lambda found: self.task.rows(found, targets)
            )
            loss = distillation.mix(loss, distill_loss)
            losses = {"distill_loss": distill_loss, "loss": loss}
        weight = self.task.weight(targets)
        shown = {"train": "loss", "val": self.task.primary.name}.get(split)
        meters: Any = self.meters[f"{split}_meters"]
        for key, meter in meters.items():
            if not meter.update_called:
                # Lightning reads it at the end. To log every batch takes as long as the step of a
                # small network.
                name = f"{self.metric_prefix}{split}/{key}"
                self.log(name, meter, prog_bar=shown == key, on_step=False, on_epoch=True)
            if key in losses:
                meter.update(losses[key], weight)
            else:
                meter.update(logits, targets)
        return loss


def _call(net: nn.Module, inputs: Tensor) -> Any:
    return net(inputs)
