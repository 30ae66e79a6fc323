"""The classification task: losses, metrics, optimizers."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memfold
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.logging.epoch_metrics import CHECKPOINT_KEY, EpochMetrics
from memfold.logging.quiet import hush_libraries
from memfold.tasks import Classification, TaskModule
from memfold.training.schedules import Constant

NUM_CLASSES = 3


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    """10 samples: batches of 4, 4 and 2, so that a plain mean of batch means is wrong."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(10, 5, generator=generator), torch.randint(3, (10,), generator=generator)


SPEC = DataSpec(Images(1, 1, 5), Classes(NUM_CLASSES))


def task(net: nn.Module, rate: float = 0.0, label_smoothing: float = 0.0) -> TaskModule:
    return TaskModule(
        net,
        Classification(SPEC, label_smoothing=label_smoothing),
        optimizer=lambda net, _: torch.optim.SGD(net.parameters(), lr=rate),
        scheduler=Constant().attach,
    )


def trainer(folder: Path) -> Trainer:
    hush_libraries()
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def loader(samples: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*samples), batch_size=4)


def test_metrics_are_means_over_all_samples(samples: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, NUM_CLASSES)
    images, labels = samples
    with torch.no_grad():
        logits = net(images)
    run = trainer(tmp_path)
    # With learning rate 0 the network stays what it was.
    run.fit(task(net, label_smoothing=0.2), loader(samples), loader(samples))
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    accuracy = float((logits.argmax(1) == labels).float().mean())
    smooth = float(F.cross_entropy(logits, labels, label_smoothing=0.2))
    plain = float(F.cross_entropy(logits, labels))
    assert metrics["train/loss"] == pytest.approx(smooth, rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(plain, rel=1e-5)
    assert metrics["train/acc"] == metrics["val/acc"] == pytest.approx(accuracy)
    assert metrics["lr"] == 0


def test_test_metrics_have_their_own_names(samples: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.test(task(nn.Linear(5, NUM_CLASSES)), loader(samples), verbose=False)
    assert set(run.callback_metrics) == {"test/loss", "test/acc"}


def test_metrics_are_logged_once_for_all_batches(
    samples: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged, log = [], TaskModule.log

    def noting(module: TaskModule, name: str, *args: object, **options: object) -> None:
        logged.append(name)
        log(module, name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TaskModule, "log", noting)
    trainer(tmp_path).fit(task(nn.Linear(5, NUM_CLASSES)), loader(samples), loader(samples))
    names = ("lr", "train/acc", "train/loss", "val/acc", "val/loss")
    assert sorted(logged) == sorted(names)


def test_to_note_the_hook_of_a_step_is_an_assignment(
    samples: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, search = [], nn.Module.__setattr__

    def noting(module: nn.Module, name: str, value: object) -> None:
        searched.append((type(module), name))
        search(module, name, value)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "__setattr__", noting)
    module = task(nn.Linear(5, NUM_CLASSES))
    trainer(tmp_path).fit(module, loader(samples), loader(samples))
    assert (TaskModule, "net") in searched
    assert (TaskModule, "_current_fx_name") not in searched


def test_a_resumed_epoch_goes_on_from_what_earlier_versions_counted(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net, run, resumed = nn.Linear(5, NUM_CLASSES), trainer(tmp_path), EpochMetrics()
    module, (images, labels) = task(net), samples
    counts = {"tp": 3, "fp": 1, "tn": 7, "fn": 1}
    sums = {
        "training_step.train/acc": {name: torch.tensor([n]) for name, n in counts.items()},
        "training_step.train/loss": {
            "value": torch.tensor([8.0]),
            "cumulated_batch_size": torch.tensor([4.0]),
        },
    }
    resumed.on_load_checkpoint(run, module, {CHECKPOINT_KEY: {"sums": sums}})
    run.callbacks.append(resumed)  # pyright: ignore
    run.fit(module, loader(samples), loader(samples))
    with torch.no_grad():
        logits = net(images)
    hits = int((logits.argmax(1) == labels).sum())
    assert float(run.callback_metrics["train/acc"]) == pytest.approx((3 + hits) / 14)
    loss = float(F.cross_entropy(logits, labels, reduction="sum"))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx((8 + loss) / 14)


def test_frozen_parameters_are_left_to_themselves(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, NUM_CLASSES))
    net[0].requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    run = trainer(tmp_path)
    run.fit(task(net, rate=0.1), loader(samples), loader(samples))
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]


def test_schedule_is_stepped_per_optimizer_step_and_knows_its_length(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    known = {}

    def scheduler(optimizer: torch.optim.Optimizer, **lengths: int):
        known.update(lengths)
        return Constant().attach(optimizer, **lengths)

    module = TaskModule(
        nn.Linear(5, NUM_CLASSES),
        Classification(SPEC, label_smoothing=0.0),
        optimizer=lambda net, _: torch.optim.SGD(net.parameters(), lr=0.1),
        scheduler=scheduler,
    )
    hush_libraries()
    run = trainer(tmp_path)
    run.accumulate_grad_batches = 2
    run.fit_loop.max_epochs = 5
    run.fit(module, loader(samples), loader(samples))
    assert known == {"total_steps": 10, "steps_per_epoch": 2}
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 10


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_wrong_label_smoothing_is_named(value: float) -> None:
    with pytest.raises(InputError, match=r"task\.label_smoothing"):
        task(nn.Linear(5, NUM_CLASSES), label_smoothing=value)


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_clipping_limits_the_step_of_the_dense_weights(
    samples: tuple[Tensor, Tensor], tmp_path: Path, ratio: float
) -> None:
    torch.manual_seed(0)
    net = memfold.compress(nn.Linear(5, NUM_CLASSES), "stable_rps", ratio=ratio)
    images, labels = samples
    before = [p.detach() for p in memfold.densify(net).parameters()]
    clipping = trainer(tmp_path)
    clipping.gradient_clip_val = 0.01
    one_batch = loader((images[:4], labels[:4]))
    clipping.fit(task(net, rate=1.0), one_batch, one_batch)
    after = [p.detach() for p in memfold.densify(net).parameters()]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
