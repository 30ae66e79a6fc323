"""Muon's steps against their definition, and who is decayed."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.backbones.vit import ViT
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.strategies import strategy_class
from memfold.training import run
from memfold.training.muon import Muon, orthogonalised
from memfold.training.optimizers import optimizer_factory
from memfold.training.parameter_groups import hidden_matrices
from strategies.cases import STRATEGIES, options_of
from training.jobs import SMALL, compose_job

MUON = {"_target_": "memfold.training.muon.Muon", "lr": 0.1, "weight_decay": 0.5}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5}
OUTPUTS = 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 7), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(7, OUTPUTS)).double()


def make(net: nn.Module, decay: str = "matrices", **config: Any) -> torch.optim.Optimizer:
    return optimizer_factory({**config, "decay": decay})(net, OUTPUTS)


def backward(net: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    net.zero_grad()
    net(torch.randn(8, 2, 5, 5).double()).square().sum().backward()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
    scale=st.floats(-6, 6),
)
def test_only_the_singular_values_change(rows: int, columns: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = 10**scale * torch.randn(rows, columns, generator=generator).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalised(matrix), left * values @ right, rtol=1e-8, atol=1e-9)
    assert torch.equal(orthogonalised(0 * matrix), 0 * matrix)


@pytest.mark.parametrize("name", ["dense", "mag", "low_rank"])
def test_tables_of_positions_are_free_of_decay(name: str) -> None:
    net = memfold.compress(nn.Sequential(ViT(1, 8, 10, width=32, depth=1)), name, ratio=1)
    names = {id(p): parameter for parameter, p in net.named_parameters()}
    free = make(net, **ADAMW).param_groups[1]
    assert free["weight_decay"] == 0
    tables = [names[id(p)] for p in free["params"] if p.dim() > 1 or "values" in names[id(p)]]
    assert tables == ["0.positions_values" if name == "mag" else "0.positions"]


def test_muon_on_matrices_and_adamw_on_the_rest() -> None:
    net, twin = network(), network()
    optimizer = make(net, **MUON)
    head, others = [twin[5].weight], [p for p in twin.parameters() if p.dim() == 1]
    # By this `low_rank` knows how a penalty of its own is subtracted.
    assert all(group["decoupled_weight_decay"] for group in optimizer.param_groups)
    groups = [{"params": head}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    momenta = {index: torch.zeros_like(twin[index].weight) for index in (0, 3)}
    for step in range(3):
        backward(net, step)
        for one, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert one.grad is not None
            other.grad = one.grad.clone()
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            for index, momentum in momenta.items():
                weight = twin[index].weight
                momentum.mul_(0.95).add_(weight.grad, alpha=0.05)
                update = (0.05 * weight.grad + 0.95 * momentum).flatten(1)
                length = 0.2 * sqrt(max(update.shape))
                weight.mul_(1 - 0.1 * 0.5)
                weight.sub_(0.1 * length * orthogonalised(update).view_as(weight))
        for (name, found), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
            is_muons = name in ("0.weight", "3.weight")
            torch.testing.assert_close(found, expected, rtol=1e-12 if is_muons else 0, atol=1e-15)


def test_torch_takes_nearly_the_same_step() -> None:
    """It has singular values near 1 in bfloat16."""
    net, twin = (nn.Sequential(nn.Linear(20, 30), nn.Linear(30, OUTPUTS)) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    for each in (net, twin):
        each(torch.ones(4, 20)).square().sum().backward()
    optimizer = make(net, **MUON)
    theirs = torch.optim.Muon(
        [twin[0].weight], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"
    )
    before = net[0].weight.detach().clone()
    optimizer.step()
    theirs.step()
    steps = [each[0].weight.detach() - before for each in (net, twin)]
    torch.testing.assert_close(*steps, rtol=0.05, atol=0.01 * float(steps[0].abs().max()))


@pytest.mark.parametrize("name", ["mag", "rigl"])
def test_kept_values_move_as_the_entries_of_their_matrix(name: str) -> None:
    net = memfold.compress(network(), name, ratio=0.5)
    optimizer = make(net, **MUON, momentum=0.0)
    compression = compression_of(net)
    assert compression is not None
    for step in range(2):
        backward(net, step)
        memfold.before_step(net, optimizer, step=step + 1, total_steps=100)
        before = memfold.densify(net)
        gradients, masks = [], []
        for parameter, (shape, positions) in compression.entries().items():
            matrix = torch.zeros(shape.numel()).double()
            matrix[positions] = parameter.grad
            gradients.append(matrix.view(shape))
            masks.append((matrix != 0).view(shape))
        optimizer.step()
        after = memfold.densify(net)
        for number, index in enumerate((0, 3)):
            gradient = gradients[number].flatten(1)
            step_of = 0.1 * 0.2 * sqrt(max(gradient.shape)) * orthogonalised(gradient)
            expected = (
                0.95 * before[index].weight - step_of.view_as(before[index].weight) * masks[number]
            )
            torch.testing.assert_close(after[index].weight, expected, rtol=1e-12, atol=1e-15)


def hidden(net: nn.Module) -> list[str]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [names[id(p)] for p in hidden_matrices(net, OUTPUTS)]


def test_which_matrices_are_hidden() -> None:
    assert hidden(network()) == ["0.weight", "3.weight"]
    assert hidden(memfold.compress(network(), "low_rank", ratio=0.4)) == [
        *("0.weight_left", "0.weight_right"),
        *("3.weight_left", "3.weight_right"),
    ]
    for tied in (True, False):
        gpt = GPT(OUTPUTS, 4, width=8, depth=1, num_heads=2, positions="learned", tied_head=tied)
        expected = {n for n, p in gpt.named_parameters() if n.startswith("blocks.") and p.dim() > 1}
        assert set(hidden(gpt)) == expected
        assert len(expected) == 4
        memfold.compress(gpt, "mag", ratio=0.5)
        assert set(hidden(gpt)) == {f"{name}_values" for name in expected}
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.LSTM(4, 3), nn.Linear(3, 2))
    assert hidden(grouped) == ["1.weight_ih_l0", "1.weight_hh_l0", "2.weight"]


def test_frozen_parameters_are_left_to_themselves() -> None:
    net = network()
    net[0].requires_grad_(False)
    groups = make(net, decay="all", **ADAMW).param_groups
    assert [len(group["params"]) for group in groups] == [6]


DECAYED: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "gpt": lambda: GPT(OUTPUTS, 4, width=8, depth=1, num_heads=2).double(),
}


@pytest.mark.parametrize("backbone", DECAYED)
@pytest.mark.parametrize("name", ["dense", "stable_rps", "roast", "hashednet", "mag", "set"])
def test_what_stands_for_matrices_is_decayed_as_they_are(name: str, backbone: str) -> None:
    net = DECAYED[backbone]()
    options = options_of(name, ratio=0.5)
    if backbone == "gpt" and not strategy_class(name).trains_matrices:  # one vector for all
        options["exclude"] = ("embedding",)
    memfold.compress(net, name, **options)
    optimizer = make(net, **ADAMW)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = memfold.densify(net).state_dict()
    optimizer.step()
    tables = [n for n, m in net.named_modules() if isinstance(m, nn.Embedding)]
    free = {f"{n}.weight" for n in tables} | ({"head.weight"} if tables else set())
    for key, tensor in memfold.densify(net).state_dict().items():
        is_decayed = tensor.dim() > 1 and key not in free
        expected = before[key] * 0.95 if is_decayed else before[key]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=0, msg=key)


@pytest.mark.parametrize(
    "name", [name for name in sorted(STRATEGIES) if not strategy_class(name).trains_matrices]
)
def test_strategies_without_matrices_refuse_muon(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"optimizer=muon .*compression={name} trains no matri"):
        run(compose_job(tmp_path, *SMALL, f"compression={name}", "optimizer=muon"))


@pytest.mark.parametrize("name", ["low_rank", "ltr"])
def test_muon_trains_what_stands_for_matrices(name: str, tmp_path: Path) -> None:
    options = (f"compression={name}", "ratio=0.5", "optimizer=muon", "debug=fast")
    assert run(compose_job(tmp_path, *SMALL, *options))["status"] == "completed"


def test_muon_refuses_shares_of_matrices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs whole matrices, of which each process has a share"):
        run(compose_job(tmp_path, *SMALL[:2], "trainer=fsdp", "optimizer=muon"))


def test_muon_goes_on_from_plain_values(tmp_path: Path) -> None:
    net, twin = network(), network()
    first, second = make(net, **MUON), make(twin, **MUON)
    backward(net, 0)
    first.step()
    torch.save((net.state_dict(), first.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(weights)
    second.load_state_dict(state)
    for each, optimizer in ((net, first), (twin, second)):
        backward(each, 1)
        optimizer.step()
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_closure_is_called_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Muon([parameter])

    def closure() -> Tensor:
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (parameter < 1).all()


def test_a_checkpoint_with_other_groups_is_refused_in_one_line(tmp_path: Path) -> None:
    options = (*SMALL, "optimizer=adamw", "optimizer.decay=matrices", "trainer.max_epochs=1")
    run(compose_job(tmp_path, *options))
    last = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    groups[0]["params"].append(groups[1]["params"].pop())  # a bias was decayed once
    torch.save(checkpoint, last)
    more = (f"resume={tmp_path}", "trainer.max_epochs=2")
    with pytest.raises(InputError, match=r"^resume: .*last\.ckpt has an optimizer with other gr"):
        run(compose_job(tmp_path, *options[:-1], *more))
