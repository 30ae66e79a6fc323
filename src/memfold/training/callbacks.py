"""What every run observes: seeds, divergence, memory and time.

These callbacks watch; none changes the network.
"""

import logging
import math
import random
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn
from torch.optim import SGD

from memfold.errors import InputError
from memfold.memory import PeakMeter, footprint, grad_sync_bytes, train_state_bytes
from memfold.processes.lightning_internals import SteppedCheckpoint, has_validated
from memfold.seeding import derive_seed
from memfold.training.distributed import whole_parameters
from memfold.training.validation import is_followed_by_a_step
from memfold.training.weight_average import average_of

__all__ = [
    "EpochLog",
    "FiniteLoss",
    "MemoryMetrics",
    "RunCheckpoint",
    "RunProgressBar",
    "StepSeeds",
    "StepTimer",
]

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class EpochLog(Callback):
    """Write one line per epoch to the log of the run."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every metric of the epoch."""
        metrics = sorted(trainer.callback_metrics.items())  # on all ranks: reading reduces them
        if trainer.is_global_zero:
            text = ", ".join(f"{key} {float(value):.4g}" for key, value in metrics)
            log.info("epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, text)


class FiniteLoss(Callback):
    """Stop when a loss or a parameter is no longer a finite number.

    This happens before a checkpoint is written: callbacks that watch come before those that save.
    The loss of a step is read one step later: the GPU has it by then, and goes on without a pause.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Look at the loss of the step before, and keep this one's."""
        self._check(trainer)
        loss = outputs["loss"].detach()
        # Not finite on one rank is not finite in the sum: all ranks stop together.
        self._pending = (trainer.global_step, trainer.strategy.reduce(loss, reduce_op="sum"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last loss of the epoch and at the parameters."""
        self._check(trainer)
        self._pending = None
        self._check_parameters(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the last loss and at the parameters: nothing else may be saved."""
        self._check(trainer)
        self._check_parameters(trainer, pl_module)

    def _check_parameters(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finite = {name: p.isfinite().all() for name, p in pl_module.named_parameters()}
        is_finite = bool(torch.stack(list(finite.values())).all())
        # Where the parameters are sharded, a rank sees its part of them.
        if not trainer.strategy.reduce_boolean_decision(is_finite):
            name = next((name for name, value in finite.items() if not value), "of another rank")
            raise _diverged(trainer, f"the parameter {name} is not finite", trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation loss."""
        self._check_metrics(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the test loss."""
        self._check_metrics(trainer)

    def _check_metrics(self, trainer: Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.endswith("/loss") and not torch.isfinite(value):
                raise _diverged(trainer, f"{name} is {value.item()}", trainer.global_step)

    def _check(self, trainer: Trainer) -> None:
        if self._pending is None:
            return
        step, loss = self._pending
        value = loss.item()  # one read; on the tensor, several operations come first
        if not math.isfinite(value):
            raise _diverged(trainer, f"the training loss is {value}", step)


class MemoryMetrics(Callback):
    """Count bytes: what is stored before training, the train state, the peak.

    Everything is logged as `memory/...` to all loggers.
    """

    def __init__(self) -> None:
        self._meter: PeakMeter | None = None
        self._train_state_bytes: int | None = None
        self._earlier_peak_bytes = 0

    def start(self, device: torch.device) -> None:
        """Start to measure the peak: after the data are in memory, before the backbone is."""
        self._meter = PeakMeter(device)
        self._meter.start()

    def start_round(self) -> None:
        """Count and log again what depends on the structure; the peak is that of all rounds."""
        self._train_state_bytes = None

    def measure(self, net: nn.Module) -> dict[str, int | float | None]:
        """Return all counts so far; the train state is `None` before the first optimizer step."""
        counts = footprint(net)
        return {
            "dense_bytes": counts.dense_bytes,
            "value_bytes": counts.value_bytes,
            "index_bytes": counts.index_bytes,
            "untouched_bytes": counts.untouched_bytes,
            "stored_bytes": counts.stored_bytes,
            "stored_ratio": counts.stored_ratio,
            "train_state_bytes": self._train_state_bytes,
            "peak_bytes": self._peak_bytes(),
            "grad_sync_bytes": grad_sync_bytes(net),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is known before the first step; a resumed run has logged it."""
        if self._train_state_bytes is not None:
            return
        later = ("train_state_bytes", "peak_bytes")
        with whole_parameters(trainer):
            counts = self.measure(_network(pl_module))
        _log(trainer, {key: value for key, value in counts.items() if key not in later})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the train state after the first optimizer step, gradients included."""
        if self._train_state_bytes is None and trainer.global_step > 0:
            net = _network(pl_module)
            average = average_of(trainer)
            averages = 0 if average is None else average.resident_bytes
            self._train_state_bytes = train_state_bytes(net, trainer.optimizers[0]) + averages
            _log(trainer, {"train_state_bytes": self._train_state_bytes})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the peak."""
        _log(trainer, {"peak_bytes": self._peak_bytes()})

    def state_dict(self) -> dict[str, Any]:
        """Return the counts that a resumed run cannot make again."""
        return {
            "train_state_bytes": self._train_state_bytes,
            "peak_bytes": self._peak_bytes(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts of the run that is resumed."""
        self._train_state_bytes = state_dict["train_state_bytes"]
        self._earlier_peak_bytes = state_dict["peak_bytes"]

    def _peak_bytes(self) -> int:
        now = 0 if self._meter is None else self._meter.peak_bytes()
        return max(self._earlier_peak_bytes, now)


class RunCheckpoint(SteppedCheckpoint):
    """Lightning's checkpoints, exact to resume from wherever the run folder is then.

    `every_n_train_steps` adds to those at the end of epochs. A step that is followed by a
    validation or the end of an epoch is left alone, or a run resumed from there would skip those:
    what is due then is saved one step later, or at the end of the epoch.
    """

    _last_step = 0
    _is_postponed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training starts."""
        super().on_train_start(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in mid-epoch if it is time."""
        # While gradients are summed up there is nothing to go on from: they are not saved.
        has_stepped = trainer.global_step > self._last_step
        self._last_step = trainer.global_step
        if not has_stepped or not self.saves_in_epochs():
            return
        if not is_followed_by_a_step(trainer):
            self._is_postponed |= self.is_due(trainer.global_step)
        elif self._is_postponed:
            self._is_postponed = False
            self.save(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due at the end of an epoch, if there is anything to judge it by."""
        self._is_postponed = False
        is_missing = self.monitor is not None and self.monitor not in trainer.callback_metrics
        if is_missing and not has_validated(trainer):  # else a name is wrong
            return
        super().on_train_epoch_end(trainer, pl_module)
        if self.saves_in_epochs():
            self.save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the run that is resumed, with the paths of today."""
        before = state_dict["dirpath"]

        def rebased(value: Any) -> Any:
            if isinstance(value, dict):
                return {rebased(key): rebased(item) for key, item in value.items()}
            if isinstance(value, str) and value and Path(value).is_relative_to(before):
                return str(Path(str(self.dirpath), Path(value).relative_to(before)))
            return value

        super().load_state_dict(rebased(state_dict))


class RunProgressBar(RichProgressBar):
    """Lightning's bar without the logger's version, which here says nothing.

    It is drawn some times a second, and not for every batch: a small network's step is shorter
    than a drawing.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        """Take the drawings per second, at most; 0 for no bar."""
        super().__init__(refresh_rate)
        self._next_update = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, if it is time to show it."""
        now = time.monotonic()
        if self.is_enabled and (trainer.is_last_batch or now >= self._next_update):
            self._next_update = now + 1 / self.refresh_rate
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class StepSeeds(Callback):
    """Seed the global generators anew for every batch, from seed, epoch, batch and rank.

    Dropout and the like then draw the same numbers for a batch wherever training started.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Seed torch, NumPy and Python."""
        place = (trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = derive_seed(self._seed, "step", *place)
        if pl_module.device.type == "cpu":
            # torch.manual_seed looks at accelerators too: a tenth of a small network's step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class StepTimer(Callback):
    """Measure the time from one training step to the next, and of the whole fit."""

    def __init__(self) -> None:
        # Enough for a steady median; a long run must not collect them all.
        self._seconds: deque[float] = deque(maxlen=1000)
        self._num_samples: deque[int] = deque(maxlen=1000)
        self._step_start = 0.0
        self._fit_start: float | None = None
        self._earlier_seconds = 0.0
        self._world_size = 1

    @property
    def metrics(self) -> dict[str, float | None]:
        """`fit_seconds`, `step_seconds` (median per batch) and `samples_per_second` (all ranks)."""
        step = median(self._seconds) if self._seconds else None
        samples = median(self._num_samples) * self._world_size if self._num_samples else None
        return {
            "fit_seconds": self._fit_seconds(),
            "step_seconds": step,
            "samples_per_second": samples / step if step and samples else None,
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; training that starts in mid-epoch has no start of an epoch."""
        self._fit_start = self._step_start = time.perf_counter()
        self._world_size = trainer.world_size

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation and checkpoints out of the first step's time."""
        self._step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Take the time since the last step ended: loading included, and the GPU's pace."""
        now = time.perf_counter()
        self._seconds.append(now - self._step_start)
        self._num_samples.append(len(batch[1]))
        self._step_start = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._earlier_seconds = self._fit_seconds()
        self._fit_start = None

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"fit_seconds": self._fit_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the seconds of the run that is resumed."""
        self._earlier_seconds = state_dict["fit_seconds"]

    def _fit_seconds(self) -> float:
        running = 0.0 if self._fit_start is None else time.perf_counter() - self._fit_start
        return self._earlier_seconds + running


def _diverged(trainer: Trainer, what: str, step: int) -> InputError:
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rate = f", learning rate {rates[0]:.3g}" if rates else ""
    is_sgd = any(isinstance(optimizer, SGD) for optimizer in trainer.optimizers)
    other = "take optimizer=adamw, " if is_sgd else ""
    return InputError(
        f"{what} at step {step} (epoch {trainer.current_epoch}{rate}): lower optimizer.lr, {other}"
        "set scheduler.warmup_epochs or trainer.gradient_clip_val"
    )


def _network(task: LightningModule) -> nn.Module:
    net = task.net
    assert isinstance(net, nn.Module)
    return net


def _log(trainer: Trainer, metrics: Mapping[str, int | float | None]) -> None:
    named = {f"memory/{key}": float(value) for key, value in metrics.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(named, step=trainer.global_step)
        logger.save()
