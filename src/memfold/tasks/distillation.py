"""Knowledge distillation: a student learns the softened outputs of a trained teacher.

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531.
With student logits s, teacher logits t, labels y, temperature T and weight a the loss is

    (1 - a) CE(y, s) + a T^2 KL(softmax(t / T) || softmax(s / T))

averaged over the batch. T^2 makes up for the gradient of the second term, which falls as 1 / T^2:
for T -> infinity it becomes that of matching logits, (s - t) / C for C classes and logits of mean
zero. Label smoothing softens the first term as well; together they soften twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.tasks.task import logits_of

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Args:
        student: Logits (B, C).
        teacher: Logits (B, C), without gradient.
        temperature: T > 0.
    """
    # Sums of exponentials need more than 16 bits; wider logits keep their dtype.
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student, log_teacher = (
        F.log_softmax(logits.to(dtype) / temperature, dim=1) for logits in (student, teacher)
    )
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


class Distillation:
    """A teacher, and how much to learn from it.

    It is no module: a task that holds it has no parameter, no buffer and no state-dict entry more,
    so that neither the optimizer nor DDP nor a checkpoint sees the teacher.
    """

    def __init__(
        self, teacher: nn.Module, *, temperature: float, weight: float, fingerprint: str = ""
    ) -> None:
        """Freeze `teacher` and put it in evaluation mode.

        Args:
            teacher: Inputs to logits, like the student.
            temperature: T > 0.
            weight: a in [0, 1].
            fingerprint: Tells this teacher from others when a run is resumed.
        """
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.weight = weight
        self.fingerprint = fingerprint

    def loss(
        self,
        inputs: Tensor,
        logits: Tensor,
        rows: Callable[[Tensor], Tensor] = lambda found: found,
    ) -> Tensor:
        """Return the distillation loss of a batch, without its weight.

        Args:
            inputs: What the student saw, (B, ...). The teacher moves to their device, and to their
                dtype if they are numbers.
            logits: What the student made of them.
            rows: Picks the logits (N, C) that count; see `Task.rows`.
        """
        self.teacher.to(inputs.device, inputs.dtype if inputs.is_floating_point() else None)
        with torch.no_grad():
            targets = logits_of(self.teacher(inputs))
        return distillation_loss(rows(logits), rows(targets), self.temperature)

    def mix(self, label_loss: Tensor, distill_loss: Tensor) -> Tensor:
        """Weigh the loss on the labels and the distillation loss."""
        return (1 - self.weight) * label_loss + self.weight * distill_loss
