"""Optimizers around optimizers, and state that follows moving weights or is refused."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

import memfold
from memfold import InputError
from memfold.memory import train_state_bytes
from strategies.pruning.dynamic_networks import (
    NAMES,
    batches,
    dense_tensors,
    momentum_sgd,
    network,
    same_state,
    sparse_of,
    take_steps,
)

MOVING = {"update_every": 3, "end": 1.0, "decay": "constant", "fraction": 0.5}


class SAM(Optimizer):
    """Two steps, with weights put aside between them in a state of its own."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, options)
        self.base_optimizer = SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.detach().clone()
                p.add_(p.grad, alpha=0.01)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Slow weights beside those of the optimizer inside, in its own state or in a list."""

    def __init__(self, inner: Optimizer, *, in_list: bool = False) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups
        parameters = [p for group in self.param_groups for p in group["params"]]
        if in_list:
            self.slow_weights = [[p.detach().clone() for p in parameters]]
        else:
            for p in parameters:
                self.state[p]["slow"] = p.detach().clone()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        with torch.no_grad():
            for p, state in self.state.items():
                p.data.copy_(state["slow"].lerp_(p, 0.5))


def spread(net: nn.Module, entry: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
    """Put a tensor per values, such as their momentum, to their places; NaN elsewhere."""
    sparse = sparse_of(net)
    places = zip(sparse.shapes, sparse.positions, strict=True)
    return [
        torch.full((shape.numel(),), torch.nan, dtype=torch.float64).index_copy(
            0, at, entry(sparse.values(index)).detach()
        )
        for index, (shape, at) in enumerate(places)
    ]


def check_followed(before: list[Tensor], after: list[Tensor]) -> None:
    """Check that what is still there is what it was, and what is new is zero."""
    for old, new in zip(before, after, strict=True):
        stays, grown = ~old.isnan() & ~new.isnan(), old.isnan() & ~new.isnan()
        assert stays.any()
        assert grown.any()
        assert torch.equal(old[stays], new[stays])
        assert (new[grown] == 0).all()


def backward(net: nn.Module, step: int) -> None:
    inputs, targets = batches(10)[step]
    mse_loss(net(inputs), targets).backward()


@pytest.fixture
def zero(tmp_path: Path):
    """ZeRO's optimizer, in a group of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # importing it compiles a script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield ZeroRedundancyOptimizer
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["lookahead", "lightning", "zero", "zero_in_buckets"])
def test_momentum_inside_a_wrapper_follows(kind: str, zero: Any) -> None:
    net = network("set", **MOVING)
    options = {"lr": 0.1, "momentum": 0.9}
    outer: Any
    if kind.startswith("zero"):
        outer = zero(net.parameters(), SGD, parameters_as_bucket_view=kind != "zero", **options)
        inner = outer.optim
    else:
        inner = SGD(net.parameters(), **options)
        outer = {"lookahead": Lookahead, "lightning": LightningOptimizer}[kind](inner)
    for step in range(4):
        outer.zero_grad()
        backward(net, step)
        if step == 3:
            before = spread(net, lambda p: inner.state[p]["momentum_buffer"])
            slow = spread(net, lambda p: outer.state[p]["slow"]) if kind == "lookahead" else []
        memfold.before_step(net, outer, step=step, total_steps=10)
        if step < 3 or kind.startswith("zero"):
            (inner if kind == "lightning" else outer).step()
        if step == 2 and kind == "zero_in_buckets":
            addresses = [p.data_ptr() for p in net.parameters()]
    assert sparse_of(net).structure_version == 1
    if not kind.startswith("zero"):
        check_followed(before, spread(net, lambda p: inner.state[p]["momentum_buffer"]))
    if kind == "lookahead":
        check_followed(slow, spread(net, lambda p: outer.state[p]["slow"]))
    if kind == "zero_in_buckets":
        assert [p.data_ptr() for p in net.parameters()] == addresses


def test_zero_trains_as_the_optimizer_inside(zero: Any) -> None:
    for name in NAMES:
        alone, wrapped = network(name, **MOVING), network(name, **MOVING)
        take_steps(alone, momentum_sgd(alone), batches(10))
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        take_steps(wrapped, zero(wrapped.parameters(), SGD, **options), batches(10))
        assert sparse_of(alone).structure_version == 3
        assert same_state(alone, wrapped)


def train_with_sam(net: nn.Module, optimizer: SAM, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.first_step()
        backward(net, step)
        memfold.before_step(net, optimizer, step=step, total_steps=10)
        optimizer.second_step()


def test_weights_that_sam_has_put_aside_follow() -> None:
    net = network("set", **MOVING)
    optimizer = SAM(net.parameters(), lr=0.1, momentum=0.9)
    train_with_sam(net, optimizer, 3)
    weights, momentum = (
        dense_tensors(net),
        spread(net, lambda p: optimizer.base_optimizer.state[p]["momentum_buffer"]),
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # what is left of the step is the move
    optimizer.zero_grad()
    backward(net, 3)
    optimizer.first_step()
    backward(net, 3)
    memfold.before_step(net, optimizer, step=3, total_steps=10)
    check_followed(
        momentum, spread(net, lambda p: optimizer.base_optimizer.state[p]["momentum_buffer"])
    )
    optimizer.second_step()
    for old, new, mask in zip(
        weights[::2], dense_tensors(net)[::2], sparse_of(net).masks(), strict=True
    ):
        assert torch.equal(new, old * mask)


def test_a_step_that_cannot_be_skipped_is_refused() -> None:
    net = network("rigl", **MOVING)
    with pytest.raises(InputError, match="SAM acts on them beside the optimizer that it wraps"):
        train_with_sam(net, SAM(net.parameters(), lr=0.1, momentum=0.9), 10)
    assert sparse_of(net).structure_version == 0


def test_a_count_of_steps_beside_the_states_of_parameters_stays() -> None:
    net, plain = (network("set", **MOVING) for _ in range(2))
    optimizer = momentum_sgd(net)
    state: dict[Any, Any] = optimizer.state
    state["k"] = torch.tensor([0])
    take_steps(net, optimizer, batches(8))
    take_steps(plain, momentum_sgd(plain), batches(8))
    assert sparse_of(net).structure_version == 2
    assert same_state(net, plain)
    assert train_state_bytes(net, optimizer) - train_state_bytes(net, momentum_sgd(net)) == 8 + sum(
        value.numel() * 8 for value in net.parameters()
    )
    state["k"] = torch.zeros(5)
    with pytest.raises(InputError, match="SGD keeps its state 'k', which is not one tensor"):
        take_steps(net, optimizer, batches(10), first=8)


@pytest.mark.parametrize("name", NAMES)
def test_state_that_cannot_follow_is_refused(name: str) -> None:
    data = batches(10)
    for make, message in (
        (lambda p: LBFGS(p, lr=0.1, max_iter=3), "LBFGS keeps its state '.*', which is not one"),
        (
            lambda p: Lookahead(SGD(p, lr=0.1), in_list=True),
            "Lookahead keeps copies of weights in its attribute 'slow_weights'",
        ),
    ):
        net = network(name, **MOVING)
        optimizer = make(net.parameters())

        def closure(net: Any = net, optimizer: Any = optimizer, step: list[int] = [0]) -> Tensor:  # noqa: B006
            optimizer.zero_grad()
            loss = mse_loss(net(data[step[0]][0]), data[step[0]][1])
            loss.backward()
            memfold.before_step(net, optimizer, step=step[0], total_steps=10)
            return loss

        def run(optimizer: Any = optimizer, closure: Any = closure) -> None:
            for step in range(10):
                closure.__defaults__[2][0] = step
                if isinstance(optimizer, LBFGS):
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()

        with pytest.raises(InputError, match=message):
            run()
        assert sparse_of(net).structure_version == 0


def test_weights_that_another_optimizer_trains_are_refused() -> None:
    net, half = network("set", **MOVING), network("set", **MOVING)
    with pytest.raises(InputError, match="trains only some of the weights that move"):
        take_steps(net, SGD(net[0].parameters(), lr=0.1, momentum=0.9), batches(10))
    # A frozen layer moves without one.
    half[0].requires_grad_(False)
    take_steps(half, SGD(half[2].parameters(), lr=0.1, momentum=0.9), batches(10))
    assert sparse_of(half).structure_version == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_in_a_step_changes_nothing(name: str) -> None:
    once, twice = (network(name, **MOVING | {"update_every": 1}) for _ in range(2))
    take_steps(once, momentum_sgd(once), batches(8))
    optimizer, data = momentum_sgd(twice), batches(8)
    for step, (inputs, targets) in enumerate(data):
        optimizer.zero_grad()
        mse_loss(twice(inputs), targets).backward()
        for _ in range(3):
            memfold.before_step(twice, optimizer, step=step, total_steps=8)
        optimizer.step()
    assert sparse_of(twice).structure_version == 7
    assert same_state(once, twice)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("wrap", [LightningOptimizer, Lookahead, None])
def test_low_rank_decay_is_that_of_the_optimizer_inside_and_added_once(
    kind: type[Optimizer], wrap: Any
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    memfold.compress(plain, "low_rank", ratio=0.5, frobenius_decay=0.3)
    other = copy.deepcopy(plain)
    for net, calls in ((plain, 1), (other, 2)):
        inner = kind(net.parameters(), lr=0.1, weight_decay=0.1)
        outer = inner if wrap is None or net is plain else wrap(inner)
        if wrap is Lookahead and net is plain:
            outer = Lookahead(inner)
        for step in range(4):
            outer.zero_grad()
            backward(net, step)
            for _ in range(calls):
                given = inner if net is plain else outer
                memfold.before_step(net, given, step=step, total_steps=10)
            (inner if wrap is LightningOptimizer else outer).step()
    assert same_state(plain, other)


def states(net: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    return copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_momentum_follows_a_state_dict_that_moves_the_weights(name: str) -> None:
    net = network(name, **MOVING)
    optimizer, data = momentum_sgd(net), batches(10)
    take_steps(net, optimizer, data, last=3)
    best = copy.deepcopy(net.state_dict())
    take_steps(net, optimizer, data, first=3, last=6)
    before = spread(net, lambda p: optimizer.state[p]["momentum_buffer"])
    net.load_state_dict(best)
    check_followed(before, spread(net, lambda p: optimizer.state[p]["momentum_buffer"]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_going_back_to_a_checkpoint_repeats_the_training(name: str, order: tuple[int, int]) -> None:
    """Model and optimizer are loaded, in either order, in the middle of a training."""
    net = network(name, **MOVING)
    optimizer, data = momentum_sgd(net), batches(10)
    take_steps(net, optimizer, data, last=3)
    saved = states(net, optimizer)
    take_steps(net, optimizer, data, first=3)
    expected = states(net, optimizer)
    for _ in range(2):
        for index in order:
            (net, optimizer)[index].load_state_dict(copy.deepcopy(saved[index]))
        take_steps(net, optimizer, data, first=3)
        assert all(torch.equal(net.state_dict()[key], t) for key, t in expected[0].items())
