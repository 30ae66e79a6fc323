"""Regression: the loss of standardised targets, metrics in the user's unit."""

import numpy as np
import pytest
import torch
from torch import nn

from memfold.data.spec import Classes, DataSpec, Reals, Table
from memfold.errors import InputError
from memfold.tasks import Classification, Regression, task_for

SPEC = DataSpec(Table(3), Reals(mean=(10.0, -2.0), std=(4.0, 0.5)))


def test_metrics_are_in_the_users_unit_over_all_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = (torch.randn(11, 2, generator=generator) for _ in range(2))
    task = Regression(SPEC)
    meters = task.meters()
    for part in (slice(0, 4), slice(4, 11)):
        for meter in meters.values():
            meter.update(outputs[part], targets[part])
    mean, std = np.array([10.0, -2.0]), np.array([4.0, 0.5])
    said, true = (x.numpy().astype(np.float64) * std + mean for x in (outputs, targets))
    rmse = np.sqrt(((said - true) ** 2).mean(0)).mean()
    r2 = 1 - ((said - true) ** 2).sum(0) / ((true - true.mean(0)) ** 2).sum(0)
    assert float(meters["rmse"].compute()) == pytest.approx(rmse, rel=1e-5)
    assert float(meters["mae"].compute()) == pytest.approx(np.abs(said - true).mean(), rel=1e-5)
    assert float(meters["r2"].compute()) == pytest.approx(r2.mean(), rel=1e-4)
    assert float(task.loss(outputs, targets)) == pytest.approx(
        float(nn.MSELoss()(outputs, targets))
    )
    for name, meter in task.meters().items():  # the next epoch counts anew
        for found in (meter, meters[name]):
            found.reset()
            found.update(outputs[:5], targets[:5])
        assert meter.compute() == meters[name].compute()


@pytest.mark.parametrize(("mean", "std"), [(1e12, 1e-2), (0.0, 1e-200)])
def test_metrics_do_not_depend_on_where_zero_is(mean: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = (torch.randn(50, 1, generator=generator) for _ in range(2))
    meters = Regression(DataSpec(Table(1), Reals((mean,), (std,)))).meters()
    for meter in meters.values():
        meter.update(outputs, targets)
    said, true = (x.double() for x in (outputs, targets))
    errors = said - true
    r2 = 1 - errors.square().sum() / (true - true.mean()).square().sum()
    assert float(meters["r2"].compute()) == pytest.approx(float(r2), rel=1e-12)
    rmse = float(errors.square().mean().sqrt()) * std
    assert float(meters["rmse"].compute()) == pytest.approx(rmse, rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [
        ((0.0,), (0.0,), "std above 0"),
        ((0.0,), (float("nan"),), "std above 0"),
        ((float("inf"),), (1.0,), "must be finite"),
        ((0.0, 1.0), (1.0,), "2 means and 1 standard deviations"),
        ((), (), "0 means and 0 standard deviations"),
    ],
)
def test_targets_that_cannot_be_standardised_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Reals(mean, std)


def test_one_output_may_be_flat_and_one_sample_has_no_r2() -> None:
    task = Regression(DataSpec(Table(1), Reals(mean=(0.0,), std=(1.0,))))
    target = torch.tensor([[1.0], [3.0]])
    assert float(task.loss(torch.tensor([1.0, 1.0]), target)) == 2
    meter = task.meters()["r2"]
    meter.update(torch.tensor([1.0]), target[:1])
    assert torch.isnan(meter.compute())


@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 2, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must return \(5, 2\)"):
        Regression(SPEC).loss(torch.zeros(shape), torch.zeros(5, 2))


def test_the_task_is_what_the_data_ask_for() -> None:
    assert isinstance(task_for(SPEC, label_smoothing=0.0), Regression)
    classes = DataSpec(Table(1), Classes(2))
    task = task_for(classes, label_smoothing=0.1)
    assert isinstance(task, Classification)
    assert task.label_smoothing == 0.1
    with pytest.raises(InputError, match=r"label_smoothing=0\.1: the data ask for task=regression"):
        task_for(SPEC, label_smoothing=0.1)
    with pytest.raises(InputError, match="task=regression learns reals, and the data have classes"):
        Regression(classes)


def test_numbers_have_no_logits_to_distill() -> None:
    with pytest.raises(InputError, match=r"distill\.teacher: task=regression has no logits"):
        Regression(SPEC).rows(torch.zeros(1, 2), torch.zeros(1, 2))
