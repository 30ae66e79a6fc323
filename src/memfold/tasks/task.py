"""What is learned: a loss, metrics, and the primary one of them, by which runs are compared."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from memfold.data.spec import DataSpec, Target
from memfold.errors import InputError
from memfold.options import Interval

__all__ = ["Measure", "Smoothing", "Task", "logits_of"]

Smoothing = Annotated[float, Interval("[0, 1)")]
"""Share of a target that is spread over all classes."""


@dataclass(frozen=True)
class Measure:
    """What a task reports of a split beside its loss, under `SPLIT/NAME`."""

    name: str
    mode: Literal["max", "min"]
    """Which way is better."""
    unit: str


class Task(ABC):
    """A loss and metrics for a kind of target.

    A subclass states the facts below. The first of its measures is the primary one: checkpoints,
    early stopping, studies and reports go by it.
    """

    name: ClassVar[str]
    """Name in `conf/task`."""
    target: ClassVar[type[Target]]
    """What the data must ask for."""
    measures: tuple[Measure, ...]
    """What is measured of a split; `loss`, which always is, stands here where it is primary."""

    def __init__(self, spec: DataSpec) -> None:
        """Take over what the data are.

        Raises:
            InputError: They ask for another task.
        """
        if not isinstance(spec.target, self.target):
            raise InputError(
                f"task={self.name} learns {self.target.kind}, and the data have "
                f"{spec.target.kind}; task=auto takes what they ask for"
            )
        self.spec = spec

    @property
    def primary(self) -> Measure:
        """The measure by which runs are compared."""
        return self.measures[0]

    @property
    def directions(self) -> dict[str, str]:
        """Everything that is logged of the training and the validation split -> max or min."""
        modes = {"loss": "min"} | {measure.name: measure.mode for measure in self.measures}
        return {
            f"{split}/{name}": mode for split in ("train", "val") for name, mode in modes.items()
        }

    def check_network(self, net: nn.Module) -> None:
        """Look at a network before it is compressed.

        Raises:
            InputError: It cannot learn the task.
        """
        del net

    @abstractmethod
    def loss(self, output: object, target: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            output: What the network returned.
            target: (B, ...).
        """

    def training_loss(self, output: object, target: Tensor) -> Tensor:
        """Return the loss that training descends, where it is another one."""
        return self.loss(output, target)

    @abstractmethod
    def meters(self) -> Mapping[str, Metric]:
        """Return a new metric for each measure but the loss, fed with (logits, target)."""

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the logits (N, C) that a student learns from its teacher.

        Raises:
            InputError: The outputs are no logits.
        """
        raise InputError(f"distill.teacher: task={self.name} has no logits to learn from a teacher")

    def weight(self, target: Tensor) -> float:
        """Return how many parts a batch's mean loss is the mean of."""
        return float(len(target))


def logits_of(output: object, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return the tensor in what a network returned: itself, or its attribute `logits`.

    Args:
        output: What the network returned.
        shape: That it must have; `None` for any.

    Raises:
        InputError: There is none, or it has another shape.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, torch.Tensor):
        raise InputError(
            "backbone: a network must return a tensor, or an object with .logits, not "
            f"{type(output).__name__}"
        )
    if shape not in (None, found.shape):
        raise InputError(
            f"backbone: for these data a network must return {shape}, not {tuple(found.shape)}"
        )
    return found
