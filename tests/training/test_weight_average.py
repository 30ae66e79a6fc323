"""The moving average of what is trained: its numbers, where it stands, and how a run keeps it."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import memfold
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.logging.quiet import hush_libraries
from memfold.strategies import strategy_class
from memfold.strategies.dense import Dense
from memfold.training import load_model, run
from memfold.training.checkpoint_reading import StartingPoint
from memfold.training.weight_average import WeightAverage, refuse_unfit_average
from strategies.cases import STRATEGIES, options_of
from training.jobs import SMALL, compose_job
from training.run_contents import SENSITIVE, differences

DECAY = 0.8
STAYING = sorted(
    name
    for name, case in STRATEGIES.items()
    if not (strategy_class(name).moves_weights or case.needs_widths or case.transformer_depth)
)
LINEAR = {"dense", "stable_rps", "hashednet", "roast", "mag", "rand", "snip", "grasp", "synflow"}
LINEAR |= {"tied", "tied_rps"}
"""Strategies whose weights are a linear function of what is trained."""
State = dict[str, Tensor]


def state_of(net: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def dense_of(net: nn.Module) -> State:
    return state_of(memfold.densify(net))


class Watched(LightningModule):
    """Keeps what it is trained to, step by step, and what it is validated with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.trained: list[State] = []
        self.dense: list[State] = []
        self.validated: State = {}

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained.append(state_of(self.net))
        self.dense.append(dense_of(self.net))

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.validated = dense_of(self.net)

    def on_train_epoch_end(self) -> None:  # after the validation
        now = state_of(self.net)
        assert all(torch.equal(now[name], tensor) for name, tensor in self.trained[-1].items())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.05)


def fit(net: nn.Module, *callbacks: Callback) -> Watched:
    """Train on 12 samples in 3 batches an epoch, for two epochs, in float64."""
    hush_libraries()
    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(12, 6).double(), torch.randn(12, 4).double())
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=list(callbacks), **dict.fromkeys(off, False)
    )
    module = Watched(net)
    trainer.fit(module, DataLoader(samples, batch_size=4), DataLoader(samples, batch_size=12))
    return module


def average(states: list[State], name: str) -> Tensor:
    """Write the definition out."""
    last = len(states) - 1
    shares = [DECAY ** (last - i) for i in range(len(states))]
    total = torch.zeros_like(states[0][name])
    for share, state in zip(shares, states, strict=True):
        total += share / sum(shares) * state[name]
    return total


@pytest.mark.parametrize("name", STAYING)
def test_what_is_validated_and_kept_is_the_average_of_all_steps(name: str) -> None:
    torch.manual_seed(0)
    equal = [nn.Linear(12, 12) for _ in range(7 if STRATEGIES[name].needs_layers else 0)]
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), *equal, nn.Linear(12, 4))
    net.double()
    data = [(torch.randn(8, 6).double(), torch.randn(8, 4).double())]
    memfold.compress(net, name, data=data, loss=mse_loss, **options_of(name, ratio=0.5))
    module = fit(net, WeightAverage(decay=DECAY))
    found, kept = state_of(net), dense_of(net)
    parameters = dict(net.named_parameters())
    for key, tensor in found.items():
        is_averaged = key in parameters or "running" in key
        expected = average(module.trained, key) if is_averaged else module.trained[-1][key]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)
    for key, tensor in kept.items():
        assert torch.equal(module.validated[key], tensor)
        if name in LINEAR and tensor.is_floating_point():
            expected = average(module.dense, key)
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)


def test_averages_take_the_bytes_of_what_is_trained() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4)).double()
    memfold.compress(net, "stable_rps", ratio=0.1)
    net[0].bias.requires_grad_(False)
    callback, seen = WeightAverage(), []

    class Probe(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(callback.resident_bytes)

    compression = compression_of(net)
    assert compression is not None
    fit(net, callback, Probe())
    assert seen == [8 * (compression.num_values + 4)]
    assert callback.resident_bytes == 0


def test_a_resumed_run_goes_on_with_weights_and_averages(tmp_path: Path) -> None:
    """Stopped within an epoch, and after the last one with nothing left to train."""
    options = [*SENSITIVE, "compression=stable_rps", "ratio=0.3", "trainer.max_epochs=3"]
    options += ["callbacks=ema", "callbacks.ema.decay=0.9", "test_checkpoint=best"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(compose_job(whole, *options))
    assert result["ema"] == {"decay": 0.9}
    assert result["metrics"]["val/acc"] == result["metrics"]["val/best_acc"]
    signal = "+callbacks.stop={_target_: training.signals.SignalAt, hook: %s, number: %d}"
    stops = (["on_train_batch_end", 15], ["on_train_epoch_end", 2], None)
    for number, stop in enumerate(stops):
        more = [] if stop is None else [signal % tuple(stop)]
        more += [f"resume={broken}"] if number else []
        if stop is None:
            run(compose_job(broken, *options, *more))
            continue
        with pytest.raises(SystemExit):
            run(compose_job(broken, *options, *more))
        for change, now in (("~callbacks.ema", "none"), ("callbacks.ema.decay=0.5", "decay=0.5")):
            with pytest.raises(InputError, match=rf"is decay=0\.9 in that run, not {now}; a res"):
                run(compose_job(broken, *options, f"resume={broken}", change))
    assert differences(broken, whole) == []
    kept = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["weight_average"]
        for folder in (whole, broken)
    ]
    assert kept[0]["num_steps"] == kept[1]["num_steps"] > 0
    assert kept[0]["trained"].keys() == kept[1]["trained"].keys()
    for name, tensor in kept[0]["trained"].items():
        assert torch.equal(kept[1]["trained"][name], tensor)
    allow = ["training.networks.DrawingNet"]
    best = load_model(whole, "best", allow=allow).state_dict()
    for name, tensor in load_model(whole, allow=allow).state_dict().items():
        assert torch.equal(best[name], tensor)


@pytest.mark.parametrize("strategy", ["set", "rigl", "ltr"])
def test_averages_of_weights_that_move_are_refused_before_training(
    strategy: str, tmp_path: Path
) -> None:
    options = (f"compression={strategy}", "trainer.max_epochs=2", "callbacks=ema")
    with pytest.raises(InputError, match=f"callbacks=ema .* compression={strategy} moves"):
        run(compose_job(tmp_path, *SMALL, *options))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_what_else_cannot_be_averaged_is_refused() -> None:
    def check(*callbacks: Callback, strategy: object = None, decay: float | None = None) -> None:
        trainer: Any = SimpleNamespace(callbacks=list(callbacks), strategy=strategy)
        refuse_unfit_average(trainer, Dense(), StartingPoint(Path("a"), average_decay=decay), "a")

    check()
    check(WeightAverage(), decay=0.999)
    with pytest.raises(InputError, match="a share of the parameters; use trainer=ddp"):
        check(WeightAverage(), strategy=FSDPStrategy(), decay=0.999)
    with pytest.raises(InputError, match="two of them average"):
        check(WeightAverage(), WeightAverage())
    with pytest.raises(InputError, match=r"is none in that run, not decay=0\.999"):
        check(WeightAverage())
    with pytest.raises(InputError, match=r"callbacks\.ema\.decay must be a number in \[0, 1\)"):
        WeightAverage(decay=1.0)


def test_a_tied_weight_is_saved_as_its_average_under_all_names() -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 4))
    net[1].weight = net[0].weight
    callback, saved = WeightAverage(decay=DECAY), {}

    class Saved(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            saved.update(copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint()))

    module = fit(net.double(), callback, Saved())
    expected = average(module.trained, "0.weight")
    for name in ("net.0.weight", "net.1.weight"):
        torch.testing.assert_close(saved["state_dict"][name], expected, rtol=1e-12, atol=1e-14)
    trained = saved["weight_average"]["trained"]["net.0.weight"]
    assert torch.equal(trained, module.trained[-1]["0.weight"])
