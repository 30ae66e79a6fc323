"""What is counted of a split, against metrics that keep more, and against the definition."""

import torch
from torchmetrics.classification import MulticlassAccuracy

from memfold.tasks.meters import Accuracy, MeanLoss


def test_the_mean_loss_weighs_batches() -> None:
    meter = MeanLoss()
    for loss, weight in ((1.0, 2.0), (4.0, 1.0)):
        meter.update(torch.tensor(loss, requires_grad=True) * 1, weight)
    assert float(meter.compute()) == 2.0
    assert not meter.value.requires_grad


def test_the_mean_of_wide_losses_is_wide() -> None:
    meter, loss = MeanLoss(), torch.tensor(1 / 3, dtype=torch.float64)
    meter.update(loss, 1.0)
    assert meter.compute() == loss


def test_accuracy_is_the_share_of_largest_logits() -> None:
    meter, other = Accuracy(), MulticlassAccuracy(3, average="micro")
    generator = torch.Generator().manual_seed(0)
    for size in (7, 7, 5):
        logits = torch.randint(3, (size, 3), generator=generator).float()  # with ties
        target = torch.randint(3, (size,), generator=generator)
        meter.update(logits, target)
        other.update(logits, target)
    found = meter.compute()
    assert torch.equal(found, other.compute())
    assert 0 < found < 1
