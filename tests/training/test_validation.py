"""The metrics of a run are of the weights that it ends with, and its schedule of what it does."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import memfold
from memfold.backbones import MLP
from memfold.data.digits import Digits
from memfold.training import run
from training.jobs import SMALL, compose_job
from training.run_contents import epoch_rows, state

# 13 batches an epoch.
COMMON = (*SMALL, "data.batch_size=96", "optimizer.lr=0.02", "test_checkpoint=last")
OFTEN = (
    "trainer.max_epochs=2",
    "+trainer.val_check_interval=4",
    "+callbacks.last_checkpoint.every_n_train_steps=2",
    "data.crop_padding=1",
)


class Rates(Callback):
    """Keep the learning rate of every optimizer step."""

    seen: list[float]

    def __init__(self) -> None:
        type(self).seen = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class StopAt(Callback):
    """Ask for the end of the training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self._step


def stop_at(step: int) -> str:
    return f"+callbacks.stop={{_target_: {__name__}.StopAt, step: {step}}}"


def validation_accuracy(file: Path, checkpoint: dict[str, torch.Tensor] | None = None) -> float:
    """Count in plain PyTorch."""
    model = memfold.load(file, MLP(1, 8, 10)).eval()
    if checkpoint is not None:
        model.load_state_dict({k.removeprefix("net."): v for k, v in checkpoint.items()})
    data = Digits()
    data.setup("validate")
    batches = [data.on_after_batch_transfer(batch) for batch in data.val_dataloader()]
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(labels) for _, labels in batches)


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.max_epochs=3", "+trainer.check_val_every_n_epoch=2"),
        ("trainer.max_epochs=3", "+trainer.max_steps=20"),
        ("trainer.max_epochs=3", "+trainer.max_steps=5"),
        ("trainer.max_epochs=2", "+trainer.val_check_interval=0.4"),
        ("trainer.max_epochs=2", "+trainer.val_check_interval=4"),
        (
            "trainer.max_epochs=2",
            "+trainer.val_check_interval=10",
            "+trainer.check_val_every_n_epoch=null",
        ),
        ("trainer.max_epochs=4", "+trainer.check_val_every_n_epoch=2", stop_at(30)),
        ("trainer.max_epochs=2", "trainer.num_sanity_val_steps=1"),
        ("trainer.max_epochs=3", "+trainer.max_steps=20", "test_checkpoint=best"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_metrics_are_of_the_final_and_of_the_best_weights(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    metrics: Any = run(compose_job(tmp_path, *COMMON, *overrides))["metrics"]
    artifact = tmp_path / "model.safetensors"
    assert metrics["val/acc"] == pytest.approx(validation_accuracy(artifact))
    best = validation_accuracy(artifact, state(tmp_path, "best"))
    assert metrics["val/best_acc"] == pytest.approx(best)
    assert metrics["val/best_acc"] >= metrics["val/acc"]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        seen = [float(row["val/acc"]) for row in csv.DictReader(file) if row["val/acc"]]
    assert seen[-1] == pytest.approx(validation_accuracy(artifact, state(tmp_path, "last")))


def test_the_best_of_another_metric_has_its_own_name(tmp_path: Path) -> None:
    loss = ("callbacks.best_checkpoint.monitor=val/loss", "callbacks.best_checkpoint.mode=min")
    metrics: Any = run(compose_job(tmp_path, *COMMON, *loss, "debug=fast"))["metrics"]
    assert metrics["val/best_loss"] == pytest.approx(metrics["val/loss"])
    assert "val/best_acc" not in metrics


@pytest.mark.parametrize(
    ("overrides", "warmup_steps", "num_steps"),
    [
        (("+trainer.max_steps=20",), 13, 20),
        (("+trainer.max_steps=5",), 13, 5),
        (("trainer.accumulate_grad_batches=4",), 4, 12),  # 4 + 4 + 4 + 1 batches
        (("trainer.accumulate_grad_batches=4", "+trainer.max_steps=6"), 4, 6),
        (("trainer.limit_train_batches=6", "+trainer.max_steps=8"), 6, 8),
        (("+trainer.min_steps=30", stop_at(2)), 13, 30),
    ],
    ids=str,
)
def test_a_warm_up_in_epochs_is_as_long_as_those_are(
    overrides: tuple[str, ...], warmup_steps: int, num_steps: int, tmp_path: Path
) -> None:
    watch = f"+callbacks.rates._target_={__name__}.Rates"
    schedule = ("scheduler=constant", "scheduler.warmup_epochs=1")
    run(compose_job(tmp_path, *COMMON, "trainer.max_epochs=3", *schedule, watch, *overrides))
    expected = [0.02 * min(1, (step + 1) / (warmup_steps + 1)) for step in range(num_steps)]
    assert Rates.seen == pytest.approx(expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with several validations an epoch, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(compose_job(folder, *COMMON, *OFTEN))
    return folder


@pytest.mark.parametrize("stop", [7, 8, 13])
def test_validations_within_epochs_are_exact_to_resume(
    stop: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: StopAt, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self._step:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "on_train_batch_end", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run(compose_job(tmp_path / "cut", *COMMON, *OFTEN, stop_at(stop)))
    run(compose_job(tmp_path / "cut", *COMMON, *OFTEN, f"resume={tmp_path / 'cut'}"))
    assert epoch_rows(tmp_path / "cut") == epoch_rows(whole)
    for name in ("last", "best"):
        for key, value in state(whole, name).items():
            assert torch.equal(state(tmp_path / "cut", name)[key], value), (name, key)
