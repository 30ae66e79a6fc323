"""Learning-rate schedules as functions of the optimizer step.

Each is a factor of the optimizer's own learning rate. Being closed forms, they need no state
beyond the step count, and a resumed run continues them exactly.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memfold.options import NonNegative, Share, check_fields

__all__ = ["Constant", "Cosine", "MultiStep", "OneCycle", "Schedule"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A learning-rate factor with a linear warm-up."""

    warmup_epochs: NonNegative | None = 0.0
    """Length of the warm-up in epochs; parts of an epoch count."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: One is of another type than its annotation says, or out of range.
        """
        check_fields(self, "scheduler.")

    def attach(self, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> LambdaLR:
        """Return the PyTorch scheduler, to be stepped after every optimizer step.

        Args:
            optimizer: Its learning rates are the factor's base.
            total_steps: Optimizer steps in the whole training.
            steps_per_epoch: Optimizer steps in one epoch.
        """
        if (self.warmup_epochs or 0.0) * steps_per_epoch > total_steps:
            log.warning(
                "scheduler.warmup_epochs=%g is longer than the training: "
                "the learning rate does not reach its peak",
                self.warmup_epochs,
            )
        # LambdaLR puts objects with state into its checkpoint, but not functions. A lambda lets
        # a resumed run with more epochs follow the schedule of its new length.
        return _StepLambdaLR(
            optimizer, lambda step: self.factor(step, total_steps, steps_per_epoch)
        )

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return the factor for the optimizer step number `step`, counted from 0."""
        warmup_steps = round((self.warmup_epochs or 0.0) * steps_per_epoch)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return self.decay(step, warmup_steps, total_steps, steps_per_epoch)

    @abstractmethod
    def decay(self, step: int, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return the factor after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def decay(self, step: int, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final` (Loshchilov and Hutter, SGDR, eq. 5, one cycle)."""

    final: Share = 0.0
    """Factor at the end of the training, in [0, 1]."""

    def decay(self, step: int, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return the cosine between the end of the warm-up and the end of the training."""
        return _cosine(1.0, self.final, _progress(step, warmup_steps, total_steps))


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Times `gamma` at each milestone."""

    milestones: Sequence[NonNegative] | None = None
    """Epochs; at 50 % and 75 % of the training when `None`."""
    gamma: Share = 0.1
    """Factor at each milestone, in [0, 1]."""

    def attach(self, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> LambdaLR:
        """Return the PyTorch scheduler; warn of milestones that are never reached."""
        late = [m for m in self.milestones or () if m * steps_per_epoch >= total_steps]
        if late:
            log.warning("scheduler.milestones=%s lie after the end of the training", late)
        return super().attach(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def decay(self, step: int, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return `gamma` to the power of the number of milestones passed."""
        if self.milestones is None:
            passed = (2 * step >= total_steps) + (4 * step >= 3 * total_steps)
        else:
            passed = sum(step >= milestone * steps_per_epoch for milestone in self.milestones)
        return self.gamma**passed


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Half a cosine up, half a cosine down (Smith and Topin, Super-Convergence)."""

    warmup_epochs: NonNegative | None = None
    """Length of the way up in epochs; 30 % of the training when `None`."""
    initial: Share = 0.04
    """Factor at the first step, in [0, 1]."""
    final: Share = 1e-4
    """Factor at the end of the training, in [0, 1]."""

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return the factor; the way up takes the place of the linear warm-up."""
        if self.warmup_epochs is None:
            steps_up = round(0.3 * total_steps)
        else:
            steps_up = round(self.warmup_epochs * steps_per_epoch)
        if step < steps_up:
            return _cosine(self.initial, 1.0, step / steps_up)
        return self.decay(step, steps_up, total_steps, steps_per_epoch)

    def decay(self, step: int, warmup_steps: int, total_steps: int, steps_per_epoch: int) -> float:
        """Return the way down."""
        return _cosine(1.0, self.final, _progress(step, warmup_steps, total_steps))


class _StepLambdaLR(LambdaLR):
    """The learning rate is a function of the step, across a resume too.

    The checkpoint's rate belongs to the schedule's old length: without this, the first step of a
    run that is trained further would take it, which is 0 at the end of a cosine.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the saved step with this schedule's own rate."""
        super().load_state_dict(state_dict)
        groups = zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True)
        for group, base, factor in groups:
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _progress(step: int, first: int, last: int) -> float:
    return min(1.0, (step - first) / max(1, last - first))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
