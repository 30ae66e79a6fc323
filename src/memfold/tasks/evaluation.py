"""A network measured by a task, without a Trainer."""

import torch
from torch import nn

from memfold.data.data_module import DataModule
from memfold.tasks.task import Task, logits_of

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(net: nn.Module, task: Task, data: DataModule) -> dict[str, float]:
    """Return the loss and the metrics of the validation and the test split.

    Args:
        net: In evaluation mode, on the CPU.
        task: Loss and metrics.
        data: Set up for fit and for test.

    Returns:
        `val/loss`, `test/loss` and so on.
    """
    found: dict[str, float] = {}
    for split, batches in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        meters, total, loss = task.meters(), 0.0, 0.0
        for batch in batches:
            inputs, targets = data.on_after_batch_transfer(batch)
            output = net(inputs)
            weight = task.weight(targets)
            loss += task.loss(output, targets).item() * weight
            total += weight
            for meter in meters.values():
                meter.update(logits_of(output), targets)
        found[f"{split}/loss"] = loss / total
        found |= {f"{split}/{name}": float(meter.compute()) for name, meter in meters.items()}
    return found
