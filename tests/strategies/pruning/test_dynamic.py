"""Trainings whose connections move: whole ones, interrupted ones, on two processes."""

import copy
import io
import math
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, Optimizer

import memfold
from memfold.errors import InputError
from memfold.seeding import derive_seed
from reference import dynamic as reference
from strategies.pruning.dynamic_networks import (
    NAMES,
    Batch,
    batches,
    dense_tensors,
    momentum_sgd,
    network,
    same_state,
    sparse_of,
    take_steps,
    train_half,
    update,
)


@pytest.mark.parametrize("decay", ["cosine", "constant"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_naive_loop_step_for_step(name: str, decay: str) -> None:
    data = batches(30)
    net = network(name, update_every=4, decay=decay, fraction=0.5, end=0.8)
    sparse = sparse_of(net)
    masks = [sparse.masks()[0], torch.ones(12), sparse.masks()[1], torch.ones(4)]

    def loss(tensors: list[Tensor], batch: Batch) -> Tensor:
        first, first_bias, second, second_bias = tensors
        hidden = torch.tanh(batch[0] @ first.T + first_bias)
        return mse_loss(hidden @ second.T + second_bias, batch[1])

    def random_order(index: int, step: int) -> list[int]:
        if index in (1, 3):  # biases are whole
            return [0] * masks[index].numel()
        seed = derive_seed(1, "grow", sparse.names[index // 2], step)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(masks[index].numel(), generator=generator).tolist()

    expected = reference.train(
        dense_tensors(net),
        [mask.double() for mask in masks],
        loss,
        data,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.01,
        every=4,
        fraction=0.5,
        end=0.8,
        decay=decay,
        skip_step=name == "rigl",
        growth=None if name == "rigl" else random_order,
    )

    def compare(step: int) -> None:
        tensors, naive_masks = next(expected)
        for mask, naive in zip(sparse.masks(), naive_masks[::2], strict=True):
            assert torch.equal(mask, naive.bool()), step
        for tensor, naive in zip(dense_tensors(net), tensors, strict=True):
            torch.testing.assert_close(tensor, naive, rtol=1e-11, atol=1e-14)

    take_steps(net, momentum_sgd(net), data, watch=compare)
    # Steps 4, 8, 12, 16, 20; the end is at 24. In step 20, the cosine leaves less than one weight.
    assert sparse.structure_version == (4 if decay == "cosine" else 5)


@pytest.mark.parametrize("density", ["uniform", "er", "erk"])
@pytest.mark.parametrize("name", NAMES)
def test_counts_of_every_layer_are_constant(name: str, density: str) -> None:
    net = network(name, update_every=2, decay="constant", density=density)
    sparse = sparse_of(net)
    counts, before = sparse.counts, sparse.masks()
    assert sum(counts) == round(0.3 * 120)
    versions: list[int] = []

    def check(step: int) -> None:
        assert sparse.counts == counts == [int(mask.sum()) for mask in sparse.masks()]
        versions.append(sparse.structure_version)

    take_steps(net, Adam(net.parameters(), lr=0.01), batches(20), watch=check)
    assert versions[-1] == 7  # 2, 4, ..., 14
    assert all(not torch.equal(*pair) for pair in zip(before, sparse.masks(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"fraction": 0.0}, {"end": 0.0}, {"update_every": 50}, {"ratio": 1.0}]
)
def test_without_anything_to_replace_training_is_static(name: str, options: dict[str, Any]) -> None:
    net, plain = (network(name, **{"update_every": 2, **options}) for _ in range(2))
    data = batches(12)
    too_short = pytest.warns(UserWarning, match="updates nothing in 12 steps: .* below 9,")
    with too_short if "update_every" in options else nullcontext():
        take_steps(net, momentum_sgd(net), data)
    optimizer = momentum_sgd(plain)
    for inputs, targets in data:
        optimizer.zero_grad()
        mse_loss(plain(inputs), targets).backward()
        optimizer.step()
    assert same_state(net, plain)
    assert sparse_of(net).structure_version == 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_after_the_end(name: str) -> None:
    net = network(name, update_every=1, decay="constant", end=0.5)
    versions: list[int] = []
    take_steps(
        net,
        momentum_sgd(net),
        batches(10),
        watch=lambda _: versions.append(sparse_of(net).structure_version),
    )
    assert versions == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_schedule_of_the_fraction() -> None:
    rules = sparse_of(network("rigl", fraction=0.4, end=0.5)).rules
    assert rules.fraction_at(0, 100) == pytest.approx(0.4)
    assert rules.fraction_at(25, 100) == pytest.approx(0.2)
    assert rules.fraction_at(10, 100) == pytest.approx(0.2 * (1 + math.cos(math.pi / 5)))
    assert rules.fraction_at(50, 100) == rules.fraction_at(99, 100) == 0
    rules = sparse_of(network("set", fraction=0.4, end=0.5, decay="constant")).rules
    assert [rules.fraction_at(t, 100) for t in (0, 49, 50)] == [0.4, 0.4, 0]


def reloaded(net: nn.Module, optimizer: Optimizer, name: str, options: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    fresh = network(name, **options)
    fresh.load_state_dict(states[0])
    fresh_optimizer = momentum_sgd(fresh)
    fresh_optimizer.load_state_dict(states[1])
    return fresh, fresh_optimizer


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_after_any_step(name: str) -> None:
    options = {"update_every": 3, "fraction": 0.6}
    data = batches(12)
    net = network(name, **options)
    take_steps(net, momentum_sgd(net), data)
    for stop in range(1, 9):
        half = network(name, **options)
        optimizer = momentum_sgd(half)
        take_steps(half, optimizer, data, last=stop)
        copies = [reloaded(half, optimizer, name, options)]
        copies += [copy.deepcopy((half, optimizer)), pickle.loads(pickle.dumps((half, optimizer)))]
        for other, other_optimizer in copies:
            take_steps(other, other_optimizer, data, first=stop)
            assert same_state(net, other), stop


def test_a_postponed_update_survives_an_interruption() -> None:
    options: dict[str, Any] = {"update_every": 3, "fraction": 0.5, "decay": "constant", "end": 1.0}
    data = batches(10)
    data[3] = (data[3][0], torch.full_like(data[3][1], torch.inf))
    net = network("rigl", **options)
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, data, last=3)
    update(net, optimizer, data[3])
    fresh, fresh_optimizer = reloaded(net, optimizer, "rigl", options)
    for each in ((net, optimizer), (fresh, fresh_optimizer)):
        take_steps(*each, data, first=4, last=6)
        assert sparse_of(each[0]).structure_version > 0
    assert same_state(net, fresh)


def test_a_state_without_the_coming_update_is_refused() -> None:
    net = network("rigl")
    state = net.state_dict()
    assert state["update_due"].dtype == torch.bool
    with pytest.raises(RuntimeError, match="update_due must be one truth value"):
        net.load_state_dict({**state, "update_due": torch.zeros(2)})
    del state["update_due"]
    with pytest.raises(RuntimeError, match=r"Missing key.*update_due"):
        net.load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_trains_on(name: str, tmp_path: Path) -> None:
    data = batches(12)
    net = network(name, update_every=3)
    take_steps(net, momentum_sgd(net), data, last=5)
    memfold.save(net, tmp_path / "net.safetensors")
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    loaded = memfold.load(tmp_path / "net.safetensors", plain)
    for each in (net, loaded):
        take_steps(each, SGD(each.parameters(), lr=0.1), data, first=5)
    assert sparse_of(loaded).structure_version == 1
    assert same_state(net, loaded)


@pytest.mark.parametrize(
    "options",
    [{"density": "uniform"}, {"density": "er"}, {"density": "erk"}, {"dense_first": True}],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_met_and_used(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    for budget in (1060, 1090) if "dense_first" in options else (950, 1000, 1050):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        memfold.compress(net, name, budget_bytes=budget, update_every=2, **options)
        file = tmp_path / "net.safetensors"
        # One value more takes its four bytes and the next byte of the index, in one layer or two;
        # the header's size has steps of 8.
        assert budget - 16 < memfold.save(net, file) <= budget
        data = [(x.float(), y.float()) for x, y in batches(8)]
        take_steps(net, momentum_sgd(net), data, last=5)
        assert sparse_of(net).structure_version > 0
        assert memfold.save(net, file) <= budget


def test_the_least_budget_of_a_whole_first_layer_is_the_number_that_the_error_says() -> None:
    def compress(budget: int) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        return memfold.compress(net, "rigl", dense_first=True, budget_bytes=budget)

    with pytest.raises(InputError, match=r"takes \d+ bytes") as error:
        compress(100)
    least = int(str(error.value).split(" takes ")[1].split()[0])
    assert memfold.footprint(compress(least)).num_values == 72 + 1
    with pytest.raises(InputError, match=f"takes {least} bytes"):
        compress(least - 1)


def test_a_lone_layer_has_no_first_one_to_keep_whole() -> None:
    net = memfold.compress(nn.Linear(20, 30), "set", dense_first=True, budget_bytes=1500)
    assert 0 < memfold.footprint(net).num_values < 600


def test_a_whole_first_layer_that_is_too_large_is_refused() -> None:
    for options in ({"budget_bytes": 350}, {"ratio": 0.5}):
        net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        with pytest.raises(InputError, match="dense_first=true keeps the 72 weights"):
            memfold.compress(net, "rigl", dense_first=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "dense"}, "compression.density must be uniform, er or erk, got 'dense'"),
        ({"decay": "linear"}, "compression.decay must be cosine or constant, got 'linear'"),
        ({"dense_first": 1}, "compression.dense_first must be true or false, got 1"),
        ({"update_every": 0}, "compression.update_every must be a whole number of at least 1"),
        ({"update_every": 2.5}, "compression.update_every must be a whole number of at least 1"),
        ({"update_every": True}, "compression.update_every must be a whole number of at least 1"),
        ({"fraction": -0.1}, "compression.fraction must be a number in [0, 1], got -0.1"),
        ({"fraction": math.nan}, "compression.fraction must be a number in [0, 1], got nan"),
        ({"end": 1.5}, "compression.end must be a number in [0, 1], got 1.5"),
        ({"end": "late"}, "compression.end must be a number in [0, 1], got 'late'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for name in NAMES:
        with pytest.raises(InputError, match=re.escape(message)):
            memfold.compress(nn.Linear(4, 4), name, ratio=0.5, **options)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_decide_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=2)
    for name in NAMES:
        states = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        net = network(name, update_every=2, decay="constant", ratio=0.1)
        take_steps(net, momentum_sgd(net), batches(10))
        assert sparse_of(net).structure_version == 3
        for key, tensor in net.state_dict().items():
            assert torch.equal(states[0][key], states[1][key])
            torch.testing.assert_close(states[0][key], tensor, rtol=1e-10, atol=1e-12)
