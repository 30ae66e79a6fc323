"""Numbers for each sample: squared error in training, RMSE, MAE and R2 in the user's unit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score

from memfold.data.spec import DataSpec, Reals
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
        return {
            "rmse": _InUnit(self.spec, MeanSquaredError(squared=False, num_outputs=num_outputs)),
            "mae": _InUnit(self.spec, MeanAbsoluteError(num_outputs=num_outputs)),
            "r2": _InUnit(self.spec, _R2(multioutput="uniform_average")),
        }


class _R2(R2Score):
    """R2; NaN of fewer than two samples, which cannot tell."""

    def compute(self) -> Tensor:
        """Return it, of all ranks."""
        few: Any = self.total < 2
        return torch.full((), torch.nan, device=self.device) if few else super().compute()


class _InUnit(Metric):
    """The mean over outputs of a metric of what a network says in the user's unit."""

    full_state_update = False

    def __init__(self, spec: DataSpec, metric: Metric) -> None:
        super().__init__()
        assert isinstance(spec.target, Reals)
        self._metric = metric
        self._mean, self._std = spec.target.mean, spec.target.std

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count outputs and targets (B, num_outputs)."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=target.device)
            for values in (self._mean, self._std)
        )
        outputs = _shaped(logits, target)
        self._metric.update(outputs.double() * std + mean, target.double() * std + mean)

    def compute(self) -> Tensor:
        """Return the mean over the outputs."""
        return self._metric.compute().mean()

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self._metric.reset()


def _shaped(output: object, target: Tensor) -> Tensor:
    outputs = logits_of(output)
    if outputs.shape == target.shape[:1] and target.shape[1:] == (1,):
        return outputs[:, None]
    return logits_of(outputs, tuple(target.shape))
