"""Modules that hold a compressed model: every public function finds it, or says that it cannot."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import memfold
from memfold import InputError
from memfold.compression import compression_of
from memfold.compression.rounds import rounds_of

OPTIONS: dict[str, dict[str, Any]] = {
    "set": {"update_every": 2, "decay": "constant"},
    "rigl": {"update_every": 2, "decay": "constant"},
    "low_rank": {"frobenius_decay": 0.1},
}


class Holder(nn.Module):
    """What a LightningModule or DDP looks like from outside."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return next(self.children())(inputs)


WRAPPERS = {
    "holder": lambda net: Holder(net=net),
    "holder_of_holders": lambda net: Holder(inner=Holder(net=net), head=nn.Identity()),
    "data_parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    return memfold.compress(net, name, **{"ratio": 0.5, **OPTIONS.get(name, {}), **options})


def train(net: nn.Module, module: nn.Module) -> None:
    """Train `net` through `module`, which is or holds it."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        inputs = torch.randn(5, 6, generator=generator)
        optimizer.zero_grad()
        mse_loss(module(inputs), torch.ones(5, 4)).backward()
        memfold.before_step(module, optimizer, step=step, total_steps=8)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "wrapper"),
    # Compiling takes seconds: once, for the strategy that looks at dense gradients.
    [*product(OPTIONS, [key for key in WRAPPERS if key != "compiled"]), ("rigl", "compiled")],
)
def test_a_step_through_a_wrapper_is_a_step_of_the_model(name: str, wrapper: str) -> None:
    alone, inside = network(name), network(name)
    train(alone, alone)
    train(inside, WRAPPERS[wrapper](inside))
    if name != "low_rank":
        assert compression_of(alone).structure_version == 2
    for key, tensor in alone.state_dict().items():
        assert torch.equal(inside.state_dict()[key], tensor)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_counts_rounds_and_dense_copies_of_a_wrapper(wrapper: str) -> None:
    net = network("ltr")
    module = WRAPPERS[wrapper](net)
    assert rounds_of(module) is compression_of(module) is compression_of(net)
    assert memfold.footprint(module) == memfold.footprint(net)
    inputs = torch.randn(3, 6)
    dense = memfold.densify(module)
    assert compression_of(dense) is None
    assert torch.equal(dense(inputs), net(inputs))


def test_a_step_without_a_compressed_model_is_refused() -> None:
    plain, net = nn.Sequential(nn.Linear(6, 12)), network("set")
    for module in (plain, Holder(net=plain), net[0]):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with pytest.raises(InputError, match="there is no compressed model in"):
            memfold.before_step(module, optimizer, step=0, total_steps=8)
    # No compression at all is one that was asked for.
    dense = memfold.compress(plain, "dense")
    memfold.before_step(dense, torch.optim.SGD(dense.parameters()), step=0, total_steps=8)


def test_a_module_that_holds_several_says_so() -> None:
    student, teacher = network("set"), network("ltr")
    both = Holder(student=student, teacher=teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"several compressed models \(student, teacher\)"):
        memfold.before_step(both, optimizer, step=0, total_steps=8)
    with pytest.raises(InputError, match=r"several compressed models \(student, teacher\)"):
        rounds_of(both)
    counts = [memfold.footprint(module).num_values for module in (student, teacher, both)]
    assert counts[2] == counts[0] + counts[1]
    # A compressed model that has been given a copy of itself is still the one that is meant.
    student.average = copy.deepcopy(student)
    assert compression_of(student) is not compression_of(student.average)


def test_a_wrapper_lets_go_of_the_weights_of_an_evaluation() -> None:
    net = network("stable_rps").eval()
    with torch.no_grad():
        net(torch.ones(1, 6))
    assert compression_of(net)._evaluation is not None
    memfold.release(Holder(net=net))
    assert compression_of(net)._evaluation is None
