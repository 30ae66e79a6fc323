"""What every run observes, on networks small enough to count by hand."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from memfold.errors import InputError
from memfold.logging.loggers import MetricsFile
from memfold.logging.quiet import hush_libraries
from memfold.processes.lightning_internals import lighten_steps
from memfold.training.callbacks import (
    FiniteLoss,
    MemoryMetrics,
    RunProgressBar,
    StepSeeds,
    StepTimer,
)
from memfold.training.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO


class Regression(LightningModule):
    """A linear layer whose loss is set to `bad_loss` at one step, counted from 1."""

    def __init__(self, bad_loss: float = 0.0, bad_step: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.bad_loss = bad_loss
        self.bad_step = bad_step
        self.num_steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.num_steps += 1
        loss = self.net(batch[0]).square().mean()
        return loss * self.bad_loss if self.num_steps == self.bad_step else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(
    folder: Path,
    module: Regression,
    *callbacks: Callback,
    num_epochs: int = 2,
    seed: int = 0,
    validate: bool = False,
    checkpoint_io: CheckpointIO | None = None,
) -> Trainer:
    """Train on 8 samples in 2 batches an epoch."""
    hush_libraries()
    torch.manual_seed(seed)
    trainer = Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=[MetricsFile(folder)],
        default_root_dir=folder,
        plugins=[] if checkpoint_io is None else [checkpoint_io],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.ones(8, 3), torch.zeros(8, dtype=torch.int64))
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader if validate else None)
    return trainer


class Draws(Callback):
    """Keep what the global generator gives in each epoch."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.numbers.append(float(torch.rand(())))


def test_draws_of_a_step_depend_on_the_seed_alone(tmp_path: Path) -> None:
    runs = []
    for seed, global_seed in ((5, 1), (5, 2), (6, 1)):
        draws = Draws()
        fit(tmp_path, Regression(), StepSeeds(seed), draws, seed=global_seed)
        runs.append(draws.numbers)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 4


@pytest.mark.parametrize("bad_loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [1, 2, 4])
def test_infinite_loss_stops_and_names_its_step(
    tmp_path: Path, bad_loss: float, bad_step: int
) -> None:
    module = Regression(bad_loss, bad_step)
    with pytest.raises(InputError, match=rf"at step {bad_step} .*optimizer\.lr"):
        fit(tmp_path, module, FiniteLoss())
    assert module.num_steps <= bad_step + 1


class BadEvaluation(Regression):
    """A finite training loss, and a validation loss or a weight that is not."""

    def __init__(self, val_loss: float, weight: float) -> None:
        super().__init__()
        self.val_loss = val_loss
        self.weight = weight

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(self.val_loss))

    def on_train_batch_end(self, *_: object) -> None:
        with torch.no_grad():
            self.net.weight[0, 0] = self.weight if self.num_steps == 2 else 0.0


@pytest.mark.parametrize(
    ("val_loss", "weight", "message"),
    [
        (float("nan"), 0.0, "val/loss is nan at step 2"),
        (0.0, float("inf"), r"the parameter net\.weight is not finite at step 2"),
    ],
)
def test_no_checkpoint_of_weights_that_are_not_finite(
    tmp_path: Path, val_loss: float, weight: float, message: str
) -> None:
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    with pytest.raises(InputError, match=message + r" .*optimizer\.lr"):
        fit(tmp_path, BadEvaluation(val_loss, weight), FiniteLoss(), saving, validate=True)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("kind", [AtomicCheckpointIO, AsyncCheckpointIO])
def test_no_checkpoint_of_the_step_whose_loss_is_not_finite(
    tmp_path: Path, kind: type[AtomicCheckpointIO]
) -> None:
    """In mid-epoch a step is saved before its loss has been looked at."""
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_train_steps=1)
    module = Regression(float("nan"), bad_step=3)
    with pytest.raises(InputError, match="the training loss is nan at step 3"):
        fit(tmp_path, module, FiniteLoss(), saving, checkpoint_io=kind())
    states = [torch.load(path)["state_dict"] for path in tmp_path.rglob("*.ckpt")]
    assert len(states) == 2
    assert all(state["net.weight"].isfinite().all() for state in states)


def test_train_state_is_parameters_gradients_and_momentum(tmp_path: Path) -> None:
    memory = MemoryMetrics()
    memory.start(torch.device("cpu"))
    module = Regression()
    assert memory.measure(module.net)["train_state_bytes"] is None
    fit(tmp_path, module, memory)
    counts = memory.measure(module.net)
    parameter_bytes = 4 * (3 * 2 + 2)
    assert counts["train_state_bytes"] == 3 * parameter_bytes
    assert counts["dense_bytes"] == counts["stored_bytes"] == parameter_bytes
    text = (tmp_path / "metrics.csv").read_text()
    for key in counts:
        assert f"memory/{key}" in text


def test_memory_survives_a_resume(tmp_path: Path) -> None:
    first, second = MemoryMetrics(), MemoryMetrics()
    first.start(torch.device("cpu"))
    module = Regression()
    fit(tmp_path, module, first)
    first.load_state_dict({**first.state_dict(), "peak_bytes": 2**50})
    second.load_state_dict(first.state_dict())
    counts = second.measure(module.net)
    assert counts["train_state_bytes"] == 3 * 4 * (3 * 2 + 2)
    assert counts["peak_bytes"] == 2**50


def test_time_adds_up_over_resumes(tmp_path: Path) -> None:
    timer = StepTimer()
    timer.load_state_dict({"fit_seconds": 1000.0})
    fit(tmp_path, Regression(), timer)
    times = timer.metrics
    assert times["fit_seconds"] is not None
    assert times["step_seconds"] is not None
    assert 1000 < times["fit_seconds"] < 1060
    assert 0 < times["step_seconds"] < 60
    assert times["samples_per_second"] == pytest.approx(4 / times["step_seconds"])


class Heir(Draws):
    """A callback that inherits its only hook of a step."""


def test_a_step_skips_the_hooks_that_callbacks_leave_empty(tmp_path: Path) -> None:
    heir, called, trained = Heir(), [], []
    note = LambdaCallback(on_before_backward=lambda *_: called.append(1))
    first = Callback()
    first.on_fit_start = lambda trainer, _: lighten_steps(trainer)  # type: ignore[method-assign]
    first.on_train_end = lambda *_: trained.append(1)  # type: ignore[method-assign]
    fit(tmp_path, Regression(), first, heir, note)
    assert (len(heir.numbers), len(called), len(trained)) == (4, 4, 1)
    hooks = ("on_before_backward", "on_train_batch_end", "on_train_batch_start")
    empty = [[getattr(c, hook) is None for hook in hooks] for c in (first, heir, note)]
    assert empty == [[True, True, True], [True, False, True], [False, True, True]]


def test_a_step_has_contexts_of_a_profiler_only_where_there_is_one(tmp_path: Path) -> None:
    used: Any = Trainer(
        accelerator="cpu", profiler="simple", logger=False, default_root_dir=tmp_path
    )
    unused: Any = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    contexts = []
    for trainer in (used, unused):
        lighten_steps(trainer)
        contexts.append({trainer.profiler.profile("a"), trainer.profiler.profile("b")})
    assert isinstance(used.profiler, SimpleProfiler)
    assert [len(found) for found in contexts] == [2, 1]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [0, 7]), (0.3, list(range(8)))])
def test_the_bar_counts_no_more_batches_than_it_shows(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[int]
) -> None:
    bar, shown, now = RunProgressBar(refresh_rate=4), [], itertools.count(1.0, seconds)
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda *args: shown.append(args[-1]))
    monkeypatch.setattr("memfold.training.callbacks.time.monotonic", lambda: next(now))
    for batch in range(8):
        trainer: Any = SimpleNamespace(is_last_batch=batch == 7)
        bar.on_train_batch_end(trainer, Regression(), None, None, batch)
    assert shown == expected
