"""Numbers for each sample: squared error in training, RMSE, MAE and R2 in the user's unit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score

from memfold.data.spec import Reals
from memfold.tasks.task import Measure, Task, logits_of

__all__ = ["Regression"]


class Regression(Task):
    """Squared error of outputs (B, num_outputs), or (B,) for one.

    Training sees standardised targets, so that a learning rate does not depend on their unit; the
    loss is theirs. Metrics are in the user's unit, and means over the outputs where there are
    several.
    """

    name = "regression"
    target = Reals
    measures = (
        Measure("rmse", "min", "RMSE"),
        Measure("mae", "min", "MAE"),
        Measure("r2", "max", "R²"),
    )

    def loss(self, output: object, target: Tensor) -> Tensor:
        """Return the mean squared error of standardised targets (B, num_outputs)."""
        return F.mse_loss(_shaped(output, target), target)

    def meters(self) -> Mapping[str, Metric]:
        """Return RMSE, MAE and R2 over all samples."""
        num_outputs = self.spec.num_outputs
        assert isinstance(self.spec.target, Reals)
        std = self.spec.target.std
        return {
            "rmse": _InUnit(MeanSquaredError(squared=False, num_outputs=num_outputs), std),
            "mae": _InUnit(MeanAbsoluteError(num_outputs=num_outputs), std),
            "r2": _InUnit(_R2(multioutput="uniform_average"), (1.0,)),
        }


class _R2(R2Score):
    """R2; NaN of fewer than two samples, which cannot tell."""

    def compute(self) -> Tensor:
        """Return it, of all ranks."""
        few: Any = self.total < 2
        return torch.full((), torch.nan, device=self.device) if few else super().compute()


class _InUnit(Metric):
    """The mean over outputs of a metric of standardised numbers, times the unit of each.

    In float64; and the mean of the targets, which may be large beside what they differ by, is not
    added.
    """

    full_state_update = False

    def __init__(self, metric: Metric, units: tuple[float, ...]) -> None:
        super().__init__()
        self._metric = metric.set_dtype(torch.float64)
        self._units = units

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count outputs and targets (B, num_outputs)."""
        self._metric.update(_shaped(logits, target).double(), target.double())

    def compute(self) -> Tensor:
        """Return the mean over the outputs."""
        found = self._metric.compute()
        units = torch.tensor(self._units, dtype=torch.float64, device=found.device)
        return (found * units).mean()

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self._metric.reset()


def _shaped(output: object, target: Tensor) -> Tensor:
    outputs = logits_of(output)
    if outputs.shape == target.shape[:1] and target.shape[1:] == (1,):
        return outputs[:, None]
    return logits_of(outputs, tuple(target.shape))
