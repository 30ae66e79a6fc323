"""What is counted of a split, batch by batch: few operations, for the sake of small networks."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Accuracy", "MeanLoss"]


class MeanLoss(Metric):
    """The mean of losses that are means themselves, each over so many parts."""

    full_state_update = False
    value: Tensor
    cumulated_batch_size: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Lightning's names for a logged number: checkpoints of earlier versions have them.
        self.add_state("value", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("cumulated_batch_size", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: float) -> None:
        """Count a scalar that is the mean over `weight` parts."""
        # Not in place: what is wider than float32 stays so.
        self.value = self.value + loss * weight
        self.cumulated_batch_size = self.cumulated_batch_size + weight

    def compute(self) -> Tensor:
        """Return the mean over all parts."""
        return self.value / self.cumulated_batch_size


class Accuracy(Metric):
    """The share of samples whose largest logit is that of their class."""

    full_state_update = False
    tp: Tensor
    fn: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Hits and misses, by the names that checkpoints of earlier versions have.
        self.add_state("tp", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("fn", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count logits (B, C) and classes (B,)."""
        hits = (logits.argmax(dim=1) == target).sum()
        self.tp = self.tp + hits
        self.fn = self.fn + (len(target) - hits)

    def compute(self) -> Tensor:
        """Return the share, float32."""
        return self.tp.float() / (self.tp + self.fn)
