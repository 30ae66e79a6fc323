"""Steps per second of train.py beside a loop by hand and Lightning's Trainer alone, in turn.

    OMP_NUM_THREADS=1 python scripts/measure_recipe.py --compression stable_rps --ratio 0.1

All three train the same network on the same batches of the digits, with SGD and momentum:
by hand   batches from the data module's loader, augmentation, forward, loss, backward,
          `memfold.before_step`, optimizer and scheduler; loss and hits are summed up
Trainer   the same in a LightningModule that logs nothing, without callbacks, loggers or validation
train.py  the recipe with its defaults: metrics, checkpoints, seeds, the bar and the rest

A number is the median time from one step to the next: validation, checkpoints and the start of
an epoch are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import memfold
from memfold.backbones import ResNet20
from memfold.backbones.mlp import MLP
from memfold.data.digits import Digits
from memfold.logging.quiet import hush_libraries

NUM_EPOCHS = 10
PROGRAM = Path(__file__).resolve().parents[1] / "train.py"
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(1, 8, 10),
    "resnet20": lambda: ResNet20(1, 8, 10),
}


class Setup:
    """A new network with its optimizer, on data that are read once."""

    def __init__(self, backbone: str, compression: str, ratio: float, data: Digits) -> None:
        torch.manual_seed(1)
        self.data, self.net = data, BACKBONES[backbone]()
        context = {"data": data.scoring_batches(0), "loss": F.cross_entropy}
        given = {} if compression == "dense" else {"ratio": ratio}
        memfold.compress(self.net, compression, **given, **context)
        self.loader = data.train_dataloader()
        self.num_steps = NUM_EPOCHS * len(self.loader)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4
        )
        self.scheduler = CosineAnnealingLR(self.optimizer, self.num_steps)
        self.seconds: list[float] = []
        self._last = 0.0

    def begin(self) -> None:
        """Start an epoch's clock."""
        self._last = time.perf_counter()

    def note(self) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def by_hand(setup: Setup) -> float:
    """Train in a loop of our own; return the seconds of a step."""
    setup.net.train()
    for epoch in range(NUM_EPOCHS):
        setup.loader.sampler.set_epoch(epoch)
        loss_sum, hits = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        setup.begin()
        for batch in setup.loader:
            images, labels = setup.data.on_after_batch_transfer(batch)
            logits = setup.net(images)
            loss = F.cross_entropy(logits, labels)
            setup.optimizer.zero_grad()
            loss.backward()
            step = len(setup.seconds)
            memfold.before_step(setup.net, setup.optimizer, step=step, total_steps=setup.num_steps)
            setup.optimizer.step()
            setup.scheduler.step()
            loss_sum += loss.detach()
            hits += (logits.argmax(dim=1) == labels).sum()
            setup.note()
    return median(setup.seconds)


class Plain(LightningModule):
    """The same step, and nothing else."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.net, self._setup = setup.net, setup

    def on_train_epoch_start(self) -> None:
        """See `Setup.begin`."""
        self._setup.begin()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `memfold.before_step`."""
        step = self.global_step
        memfold.before_step(self.net, optimizer, step=step, total_steps=self._setup.num_steps)

    def on_train_batch_end(self, *_: object) -> None:
        """See `Setup.note`."""
        self._setup.note()

    def configure_optimizers(self) -> dict[str, object]:
        """Return those that the loop by hand has."""
        scheduler = {"scheduler": self._setup.scheduler, "interval": "step"}
        return {"optimizer": self._setup.optimizer, "lr_scheduler": scheduler}


def with_trainer(setup: Setup) -> float:
    """Train with Lightning alone; return the seconds of a step."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        max_epochs=NUM_EPOCHS,
        accelerator="cpu",
        limit_val_batches=0,
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),  # pyright: ignore[reportArgumentType]
    )
    trainer.fit(Plain(setup), datamodule=setup.data)
    return median(setup.seconds)


def with_recipe(backbone: str, compression: str, ratio: float) -> float:
    """Run train.py; return the seconds of a step that it reports."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["data=digits", f"backbone={backbone}", f"compression={compression}"]
        overrides += ["logger=csv", "trainer=cpu", f"trainer.max_epochs={NUM_EPOCHS}"]
        overrides += [f"hydra.run.dir={folder}/run"]
        overrides += [] if compression == "dense" else [f"ratio={ratio}"]
        subprocess.run([sys.executable, PROGRAM, *overrides], check=True, capture_output=True)
        return json.loads(Path(folder, "run/result.json").read_text())["time"]["step_seconds"]


def main() -> None:
    """Measure in turn, and print medians over the rounds with quartiles."""
    parser = argparse.ArgumentParser(description="Time the recipe of train.py.")
    parser.add_argument("--backbone", choices=BACKBONES, default="mlp")
    parser.add_argument("--compression", default="dense")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hush_libraries()
    data = Digits(batch_size=64, crop_padding=1)
    data.setup("fit")
    what = (options.backbone, options.compression, options.ratio)
    ways: dict[str, Callable[[], float]] = {
        "by hand": lambda: by_hand(Setup(*what, data)),
        "Trainer": lambda: with_trainer(Setup(*what, data)),
        "train.py": lambda: with_recipe(*what),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            found[name].append(run())
    for name, seconds in found.items():
        pairs = zip(found["by hand"], seconds, strict=True)
        low, middle, high = quantiles([hand / own for hand, own in pairs], n=4)
        print(
            f"{name:9} {1000 * median(seconds):6.2f} ms, {1 / median(seconds):5.0f} a second, "
            f"{middle:.2f} of those by hand ({low:.2f}-{high:.2f})"
        )


if __name__ == "__main__":
    main()
