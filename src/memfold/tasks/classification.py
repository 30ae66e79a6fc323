"""One class for each sample: cross-entropy and top-1 accuracy."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from memfold.data.spec import Classes, DataSpec
from memfold.options import check_arguments
from memfold.tasks.meters import Accuracy
from memfold.tasks.task import Measure, Smoothing, Task, logits_of

__all__ = ["Classification"]


class Classification(Task):
    """Cross-entropy and top-1 accuracy of logits (B, num_classes)."""

    name = "classification"
    target = Classes
    measures = (Measure("acc", "max", "%"),)

    def __init__(self, spec: DataSpec, *, label_smoothing: Smoothing) -> None:
        """Check the options.

        Args:
            spec: Its target is `Classes`.
            label_smoothing: Share of the target spread over all classes, in [0, 1); in the
                training loss only.

        Raises:
            InputError: `label_smoothing` is out of range, or the data ask for another task.
        """
        super().__init__(spec)
        check_arguments(Classification.__init__, locals(), "task.")
        self.label_smoothing = label_smoothing

    def loss(self, output: object, target: Tensor) -> Tensor:
        """Return the mean cross-entropy of labels (B,), in nats."""
        return F.cross_entropy(self._logits(output, target), target)

    def training_loss(self, output: object, target: Tensor) -> Tensor:
        """Return it with smoothed labels."""
        logits = self._logits(output, target)
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return all of them."""
        return logits

    def meters(self) -> Mapping[str, Metric]:
        """Return the accuracy over all samples."""
        return {"acc": Accuracy()}

    def _logits(self, output: object, target: Tensor) -> Tensor:
        return logits_of(output, (len(target), self.spec.num_outputs))
