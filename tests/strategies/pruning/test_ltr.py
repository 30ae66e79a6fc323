"""Lottery-ticket rewinding in a plain loop, against a naive one; exact counts and budgets."""

from copy import deepcopy
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import memfold
from memfold.compression.rounds import rounds_of
from memfold.errors import InputError
from memfold.strategies.pruning.ltr import Ticket, round_counts
from reference.lottery_ticket import lottery_ticket

REWIND_STEP, NUM_STEPS = 3, 12
SGD: dict[str, Any] = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}


@given(
    total=st.integers(1, 5000),
    share=st.floats(0.001, 1.0),
    percent=st.integers(1, 99),
)
def test_counts_fall_by_a_share_of_what_is_left(total: int, share: float, percent: int) -> None:
    target = max(1, round(share * total))
    counts = round_counts(total, target, fraction=percent / 100)
    assert counts[0] == total
    assert counts[-1] == target
    for number, (before, after) in enumerate(pairwise(counts)):
        pruned = max(1, before * percent // 100)
        assert after == before - pruned or (number == len(counts) - 2 and before - pruned < after)


def test_the_published_densities() -> None:
    counts = round_counts(10**6, 35_000, fraction=0.2)
    expected = [floor(10**6 * Fraction(4, 5) ** number) for number in range(16)]
    # Rounding down what leaves, round after round, keeps at most one weight more each time.
    assert all(0 <= c - e <= n for n, (c, e) in enumerate(zip(counts, expected, strict=False)))
    assert len(counts) == 17


def test_rounds_can_be_chosen() -> None:
    assert round_counts(100, 10, fraction=0.5, rounds=2) == [100, 10]
    assert round_counts(100, 40, fraction=0.5, rounds=5) == [100, 50, 40, 40, 40]
    assert round_counts(100, 10, fraction=0.0, rounds=3) == [100, 100, 10]
    assert round_counts(100, 100, fraction=0.2) == [100]
    assert round_counts(100, 71, fraction=0.29) == [100, 71]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, r"compression\.fraction must be a number in \[0, 1\), got 1\.0"),
        ({"fraction": -0.1}, r"compression\.fraction must be .* -0\.1"),
        ({"fraction": float("nan")}, r"compression\.fraction must be .* nan"),
        ({"fraction": "x"}, r"compression\.fraction must be .* 'x'"),
        ({"rewind_steps": -1}, r"compression\.rewind_steps must be .* at least 0 or null, got -1"),
        ({"rewind_steps": 1.5}, r"compression\.rewind_steps must be .* 1\.5"),
        ({"rounds": 0}, r"compression\.rounds must be .* at least 1 or null, got 0"),
        ({"rounds": True}, r"compression\.rounds must be .* True"),
        ({"rounds": 1}, r"compression\.rounds=1 .* at least 2"),
        ({"fraction": 0}, r"compression\.fraction=0 never prunes"),
        (
            {"ratio": None, "budget_bytes": 850},
            "budget_bytes=850 is too small",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        memfold.compress(model, "ltr", **{"ratio": 0.5, **options})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_the_rewind_step_lies_within_the_training() -> None:
    rounds = rounds_of(memfold.compress(network(), "ltr", rewind_steps=7))
    assert rounds is not None
    assert rounds.rewind_step(8) == 7
    with pytest.raises(InputError, match=r"compression\.rewind_steps=7 must be below 7"):
        rounds.rewind_step(7)
    default = rounds_of(memfold.compress(network(), "ltr"))
    assert default is not None
    assert [default.rewind_step(steps) for steps in (1, 100, 62_400)] == [0, 3, 1872]


def test_one_round_is_none() -> None:
    assert rounds_of(memfold.compress(network(), "ltr", ratio=1.0)) is None
    assert rounds_of(memfold.compress(network(), "dense")) is None
    assert rounds_of(network()) is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 4)).double()


def train(model: nn.Module, **options: Any) -> tuple[Ticket, list[dict[str, Tensor]]]:
    """Train in rounds as the card says; return the dense state at the end of each."""
    memfold.compress(model, "ltr", **options)
    rounds = rounds_of(model)
    assert isinstance(rounds, Ticket)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    point: tuple[Any, Any] = (None, None)
    ends = []
    for number in range(rounds.num_rounds):
        if number > 0:
            begin = rounds.next_round(number)
            model.load_state_dict(point[0])
            optimizer.load_state_dict(deepcopy(point[1]))  # it takes the tensors over
            begin(optimizer)
        for step in range(REWIND_STEP if number else 0, NUM_STEPS):
            if number == 0 and step == REWIND_STEP:
                point = deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        ends.append(deepcopy(memfold.densify(model).state_dict()))
    return rounds, ends


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (16,), generator=generator)
    return nn.functional.cross_entropy(model(inputs), targets)


def test_rounds_equal_a_naive_loop_on_masked_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Tanh(), nn.Linear(20, 4, bias=False))
    model.double()
    initial = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    ticket, ends = train(model, ratio=0.1, fraction=0.4)
    assert ticket.round_counts == [200, 120, 72, 44, 27, 20]

    def loss(weights: list[Tensor], step: int) -> Tensor:
        return loss_of(lambda x: (x @ weights[0].T).tanh() @ weights[1].T, step)  # type: ignore[arg-type]

    expected = lottery_ticket(
        initial,
        loss,
        ticket.round_counts,
        rewind_step=REWIND_STEP,
        num_steps=NUM_STEPS,
        **SGD,
    )
    for found, wanted in zip(ends, expected, strict=True):
        for name, weight in zip(("0.weight", "2.weight"), wanted, strict=True):
            assert torch.equal(found[name] != 0, weight != 0)
            torch.testing.assert_close(found[name], weight, rtol=1e-10, atol=1e-12)


def test_nothing_pruned_repeats_the_round_with_its_statistics() -> None:
    _, ends = train(network(), ratio=1.0, fraction=0.0, rounds=3)
    for end in ends[1:]:
        assert all(torch.equal(end[name], tensor) for name, tensor in ends[0].items())
    assert int(ends[0]["1.num_batches_tracked"]) == NUM_STEPS


@pytest.mark.parametrize(("bits", "budget"), [(32, 2000), (8, 1600)])
def test_the_last_round_fills_the_budget(bits: int, budget: int, tmp_path: Path) -> None:
    model = network()
    ticket, ends = train(model, budget_bytes=budget, bits=bits, fraction=0.3)
    assert memfold.save(model, tmp_path / "a") <= budget
    assert len(ends) == ticket.num_rounds > 2
    # One value more, the largest of those that left last, would be too many.
    more = deepcopy(model)
    ticket = rounds_of(more)
    assert isinstance(ticket, Ticket)
    masks = ticket.masks()
    before = ends[-2]
    gone = [
        (float(before[name].abs()[place]), index, place)
        for index, name in enumerate(ticket.names)
        for place in map(tuple, ((before[name] != 0) & ~masks[index]).nonzero().tolist())
    ]
    _, index, place = max(gone)
    masks[index][place] = True
    ticket.set_masks(masks)
    assert memfold.save(more, tmp_path / "a") > budget


def test_a_ticket_survives_the_artifact(tmp_path: Any) -> None:
    model = network()
    train(model, ratio=0.25)
    memfold.save(model, tmp_path / "ticket.safetensors")
    loaded = memfold.load(tmp_path / "ticket.safetensors", network())
    inputs = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(loaded.eval()(inputs), model.eval()(inputs))
    assert memfold.footprint(loaded) == memfold.footprint(model)
