"""Averages and copies of parameters: right where positions are the same, refused where not."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import memfold
from memfold import InputError
from memfold.compression import compression_of
from memfold.logging.quiet import hush_libraries
from strategies.cases import STRATEGIES, options_of
from strategies.pruning.dynamic_networks import (
    NAMES,
    Batch,
    batches,
    momentum_sgd,
    network,
    same_state,
    sparse_of,
    take_steps,
)

MIXED = "values of a copy were changed after the model that it was copied from moved"
MOVING = {"update_every": 2, "end": 1.0, "decay": "constant", "fraction": 0.5}
Following = tuple[nn.Module, Callable[[], None]]
"""A copy, and what updates it."""
Average = Callable[[nn.Module], Following]


def averaged_model(net: nn.Module) -> Following:
    average = AveragedModel(net)
    return average, lambda: average.update_parameters(net)


def averaged_with_buffers(net: nn.Module) -> Following:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    return average, lambda: average.update_parameters(net)


def target_network(net: nn.Module) -> Following:
    target = copy.deepcopy(net)

    def follow() -> None:
        for slow, fast in zip(target.parameters(), net.parameters(), strict=True):
            slow.data.copy_(0.9 * slow.data + 0.1 * fast.data)

    return target, follow


def hard_copy(net: nn.Module) -> Following:
    target = copy.deepcopy(net)

    def follow() -> None:
        for slow, fast in zip(target.parameters(), net.parameters(), strict=True):
            slow.data = fast.data.clone()

    return target, follow


def following(target: nn.Module, net: nn.Module) -> Following:
    def follow() -> None:
        for slow, fast in zip(target.parameters(), net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)

    return target, follow


def built_alike(net: nn.Module) -> Following:
    target, compression = memfold.densify(net), compression_of(net)
    if compression is not None:
        memfold.compress(target, compression.strategy)
    target.load_state_dict(net.state_dict())
    return following(target, net)


def pickled(net: nn.Module) -> Following:
    return following(pickle.loads(pickle.dumps(net)), net)


AVERAGES = (
    averaged_model,
    averaged_with_buffers,
    target_network,
    hard_copy,
    built_alike,
    pickled,
)


@pytest.mark.parametrize("first", [0, 5])  # from the beginning, or after weights have moved
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", NAMES)
def test_averages_of_moved_weights_are_refused(
    name: str, average: Average, first: int, tmp_path: Path
) -> None:
    net = network(name, **MOVING)
    other, follow = average(net)
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, batches(8), watch=lambda step: follow() if step >= first else None)
    inputs, compressed = batches(1)[0][0], sparse_of(other).model
    uses: list[Callable[[], object]] = [
        lambda: other(inputs),
        lambda: memfold.densify(other),
        lambda: other.state_dict(),
        lambda: memfold.save(compressed, tmp_path / "never.safetensors"),
        lambda: memfold.before_step(other, optimizer, step=1, total_steps=8),
    ]
    for use in uses:
        with pytest.raises(InputError, match=MIXED):
            use()
    assert not any(tmp_path.iterdir())
    net(inputs).sum().backward()  # training may go on


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_are_right_while_nothing_moves(
    average: Average,
) -> None:
    data = batches(20)
    net = network("set", **MOVING | {"end": 0.4})
    early = copy.deepcopy(net)  # a snapshot that is left behind disturbs nobody
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, data, last=8)
    other, follow = average(net)
    reference, dense_follow = average(dense := memfold.densify(net))

    def watch(step: int) -> None:
        dense.load_state_dict(memfold.densify(net).state_dict())
        follow()
        dense_follow()

    take_steps(net, optimizer, data, first=8, watch=watch)
    assert sparse_of(net).structure_version == 3
    with torch.no_grad():
        torch.testing.assert_close(other(data[0][0]), reference(data[0][0]))
        early(data[0][0])


def test_snapshots_and_forks_of_a_model_that_moves_are_left_alone() -> None:
    data = batches(12)
    net = network("rigl", **MOVING)
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, data, last=3)
    snapshot, probed, (fork, fork_optimizer) = (
        copy.deepcopy(net),
        copy.deepcopy(net),
        copy.deepcopy((net, optimizer)),
    )
    expected = snapshot(data[0][0]).detach()
    with torch.no_grad():
        for parameter in probed.parameters():
            parameter.mul_(0.9)
        perturbed = probed(data[0][0])
    take_steps(net, optimizer, data, first=3)
    with torch.no_grad():
        assert torch.equal(snapshot(data[0][0]), expected)
        assert torch.equal(probed(data[0][0]), perturbed)
    # Trained on its own, a copy is a model like any other.
    take_steps(fork, fork_optimizer, data, first=3)
    assert same_state(fork, net)
    # And one that takes over a state dict takes over its positions.
    snapshot.load_state_dict(net.state_dict())
    with torch.no_grad():
        for parameter in snapshot.parameters():
            parameter.mul_(1.0).add_(0.0)
        assert torch.equal(snapshot(data[0][0]), net(data[0][0]))
    assert snapshot.half()(data[0][0].half()).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_whatever_becomes_of_a_snapshot_the_model_goes_on(name: str) -> None:
    data = batches(8)
    net = network(name, **MOVING)
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, data, last=1)
    tuned, scaled = copy.deepcopy(net), copy.deepcopy(net)
    take_steps(net, optimizer, data, first=1, last=6)
    expected = memfold.densify(net)
    dense = memfold.densify(tuned)
    for model in (tuned, dense):  # a plain loop, without `before_step`
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        for inputs, targets in data[:3]:
            plain.zero_grad()
            mse_loss(model(inputs), targets).backward()
            plain.step()
            if model is dense:
                with torch.no_grad():
                    for index, mask in zip((0, 2), sparse_of(tuned).masks(), strict=True):
                        model[index].weight *= mask
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(tuned(data[0][0]), dense(data[0][0]))
        assert torch.equal(net(data[0][0]), expected(data[0][0]))
        assert same_state(copy.deepcopy(net), net)
        with pytest.raises(InputError, match=MIXED):
            scaled(data[0][0])
    take_steps(net, optimizer, data, first=6)
    with torch.no_grad():
        net(data[0][0])


@pytest.mark.parametrize("name", sorted(n for n in STRATEGIES if not STRATEGIES[n].needs_layers))
def test_an_average_of_dense_copies_is_the_average_of_dense_weights(name: str) -> None:
    """What the refusal and the cards advise, for every strategy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    if name == "small":
        pytest.skip("small needs a backbone that can be built narrower; it stays dense")
    options = options_of(name, ratio=0.5) | (MOVING if name in NAMES else {})
    memfold.compress(net, name, data=batches(2), loss=mse_loss, **options)
    optimizer = momentum_sgd(net)
    average = AveragedModel(memfold.densify(net))
    weights: list[list[Tensor]] = []

    def watch(step: int) -> None:
        average.update_parameters(memfold.densify(net))
        weights.append([p.detach().clone() for p in memfold.densify(net).parameters()])

    take_steps(net, optimizer, batches(6), watch=watch)
    for found, *each in zip(average.module.parameters(), *weights, strict=True):
        torch.testing.assert_close(found, torch.stack(each).mean(0))


class Regression(LightningModule):
    """A module of the user's own, whose steps move weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        memfold.before_step(self, optimizer, step=self.global_step, total_steps=12)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
    ids=["ema", "swa"],
)
def test_averaging_callbacks_of_lightning_are_refused(callback: Callable[[], object]) -> None:
    hush_libraries()
    (inputs, targets), *_ = batches(1, size=16)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callback(), **dict.fromkeys(off, False)
    )
    task = Regression(network("set", **MOVING))

    def fit_and_validate() -> None:
        trainer.fit(task, loader, loader)
        trainer.validate(task, loader, verbose=False)

    with pytest.raises(InputError, match=MIXED):
        fit_and_validate()
