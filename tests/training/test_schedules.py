"""Learning-rate factors against PyTorch's own schedulers and by hand."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from memfold.errors import InputError
from memfold.training.schedules import Constant, Cosine, MultiStep, OneCycle, Schedule

ALL = [
    Constant(warmup_epochs=1.5),
    Cosine(warmup_epochs=2.0, final=0.1),
    MultiStep(milestones=[3, 5.5]),
    MultiStep(),
    OneCycle(),
    OneCycle(warmup_epochs=1),
]


def optimizer(rate: float = 0.4) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def rates(scheduler: LRScheduler, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_cosine_is_that_of_pytorch() -> None:
    ours = Cosine(final=0.25).attach(optimizer(), total_steps=50, steps_per_epoch=10)
    theirs = CosineAnnealingLR(optimizer(), T_max=50, eta_min=0.25 * 0.4)
    assert rates(ours, 51) == pytest.approx(rates(theirs, 51), rel=1e-9)


def test_multistep_is_that_of_pytorch() -> None:
    schedule = MultiStep(milestones=[2, 4], gamma=0.3)
    ours = schedule.attach(optimizer(), total_steps=60, steps_per_epoch=10)
    theirs = MultiStepLR(optimizer(), milestones=[20, 40], gamma=0.3)
    assert rates(ours, 60) == pytest.approx(rates(theirs, 60), rel=1e-9)


def test_multistep_drops_at_half_and_three_quarters_by_default() -> None:
    factors = [MultiStep(gamma=0.5).factor(step, 8, 2) for step in range(8)]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warmup_is_linear_and_counted_in_epochs() -> None:
    factors = [Constant(warmup_epochs=1.5).factor(step, 20, 2) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_one_cycle_rises_from_initial_to_one_and_falls_to_final() -> None:
    factors = [OneCycle(initial=0.1, final=0.01).factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[30] == 1
    assert factors[-1] == pytest.approx(0.01)
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)


@given(
    schedule=st.sampled_from(ALL),
    step=st.integers(0, 300),
    num_epochs=st.integers(1, 9),
    steps_per_epoch=st.integers(1, 30),
)
def test_factors_stay_between_zero_and_one(
    schedule: Schedule, step: int, num_epochs: int, steps_per_epoch: int
) -> None:
    factor = schedule.factor(step, num_epochs * steps_per_epoch, steps_per_epoch)
    assert 0 <= factor <= 1


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_resumed_schedule_continues_exactly(schedule: Schedule) -> None:
    whole = rates(schedule.attach(optimizer(), total_steps=70, steps_per_epoch=10), 70)
    first_optimizer = optimizer()
    first = schedule.attach(first_optimizer, total_steps=70, steps_per_epoch=10)
    assert rates(first, 33) == whole[:33]
    file = io.BytesIO()
    torch.save({"optimizer": first_optimizer.state_dict(), "scheduler": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second_optimizer = optimizer()
    second = schedule.attach(second_optimizer, total_steps=70, steps_per_epoch=10)
    second_optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["scheduler"])
    assert rates(second, 37) == whole[33:]


def test_late_milestone_and_long_warmup_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    MultiStep(milestones=[1, 50]).attach(optimizer(), total_steps=20, steps_per_epoch=10)
    Cosine(warmup_epochs=3).attach(optimizer(), total_steps=20, steps_per_epoch=10)
    assert "scheduler.milestones=[50]" in caplog.text
    assert "scheduler.warmup_epochs=3" in caplog.text


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Constant(warmup_epochs=-1), "scheduler.warmup_epochs"),
        (lambda: Cosine(final=1.5), "scheduler.final"),
        (lambda: Cosine(final=float("nan")), "scheduler.final"),
        (lambda: MultiStep(milestones=[3, -1]), "scheduler.milestones"),
        (lambda: MultiStep(gamma="x"), "scheduler.gamma"),  # type: ignore[arg-type]
        (lambda: OneCycle(initial=True), "scheduler.initial"),
        (lambda: OneCycle(warmup_epochs=float("inf")), "scheduler.warmup_epochs"),
    ],
)
def test_wrong_option_is_named(make, key: str) -> None:
    with pytest.raises(InputError, match=key):
        make()
