"""The average of the weights over the steps of a training, in place of the last ones.

With d = `decay` and w_i what is trained after optimizer step i, the average after step t is

    sum_i d^(t-i) w_i / sum_i d^(t-i),  i = 1 ... t

the exponential moving average without a share of its starting point, as Adam's moments are.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from memfold.compression import Strategy, release
from memfold.compression.accounting import tensor_bytes
from memfold.errors import InputError
from memfold.options import Interval, check_arguments
from memfold.training.checkpoint_reading import StartingPoint

__all__ = ["WeightAverage", "average_of", "refuse_unfit_average"]

_STATISTICS = ("running_mean", "running_var")


class WeightAverage(Callback):
    """Validate, test and save the exponential moving average of what is trained.

    Trained are the parameters, whatever they stand for: a shared vector, kept values, factors,
    scores. The statistics of BatchNorm are averaged with them, all in at least float32; other
    buffers are as they are. A checkpoint has the averages as its state dict, so that whoever loads
    it gets the weights that its metrics are of, and the weights to go on with beside them.
    """

    def __init__(self, *, decay: Annotated[float, Interval("[0, 1)")] = 0.999) -> None:
        """Check the options.

        Args:
            decay: What a step's weights still count one step later.

        Raises:
            InputError: It is out of range.
        """
        check_arguments(WeightAverage.__init__, locals(), "callbacks.ema.")
        self.decay = float(decay)
        self._num_steps = 0
        self._seen_step = 0
        self._averages: dict[str, Tensor] = {}
        """By name in the module; empty outside fit."""
        self._trained: dict[str, Tensor] = {}
        """What was trained, while the averages are in its place."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the averages take in training."""
        return tensor_bytes(self._averages.values())

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the averages; go on with the weights beside them."""
        kept = checkpoint["weight_average"]
        self._num_steps = kept["num_steps"]
        self._averages = {name: checkpoint["state_dict"][name] for name in kept["trained"]}
        _write(pl_module, kept["trained"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the averages, where the network is."""
        own = self._averages
        self._averages = {
            name: own.get(name, tensor)
            .detach()
            .to(tensor.device, torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in _averaged(pl_module).items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training starts."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the weights of an optimizer step."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self._num_steps += 1
        share = (1 - self.decay) / (1 - self.decay**self._num_steps)
        with torch.no_grad():
            for name, tensor in _averaged(pl_module).items():
                self._averages[name].lerp_(tensor.to(self._averages[name].dtype), share)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages in the place of what is trained."""
        release(pl_module)
        if self._averages:
            tensors = _averaged(pl_module).items()
            self._trained = {name: tensor.detach().clone() for name, tensor in tensors}
            _write(pl_module, self._averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what is trained."""
        _write(pl_module, self._trained)
        self._trained = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save both: the averages under the names of the weights."""
        trained = self._trained or {n: t.detach() for n, t in _averaged(pl_module).items()}
        by_tensor = {id(t): self._averages[n] for n, t in _averaged(pl_module).items()}
        averages = {  # under every name of a tied weight
            name: by_tensor[id(tensor)]
            for name, tensor in pl_module.state_dict(keep_vars=True).items()
            if id(tensor) in by_tensor
        }
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averages}
        checkpoint["weight_average"] = {
            "decay": self.decay,
            "num_steps": self._num_steps,
            "trained": trained,
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averages in the network, also where nothing was left to train."""
        _write(pl_module, self._averages)
        self._averages = {}


def average_of(trainer: Trainer) -> WeightAverage | None:
    """Return the callback that averages weights; `None` where the run has none.

    Raises:
        InputError: There are several.
    """
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore
    found = [callback for callback in callbacks if isinstance(callback, WeightAverage)]
    if len(found) > 1:
        raise InputError("callbacks: two of them average the weights; leave one out")
    return found[0] if found else None


def refuse_unfit_average(
    trainer: Trainer, strategy: Strategy, start: StartingPoint, resume: str | None
) -> None:
    """Check that the weights can be averaged if they are to be, and that a resumed run keeps that.

    Raises:
        InputError: They move to other places while they are trained, or each process has a share
            of them; or the checkpoint is of a run with another average.
    """
    average = average_of(trainer)
    if average is not None and strategy.moves_weights:
        raise InputError(
            f"callbacks=ema averages what is trained, and compression={strategy.name} moves "
            "weights to other places in it: choose a strategy whose masks stay, or no average"
        )
    if average is not None and isinstance(trainer.strategy, FSDPStrategy):
        raise InputError(
            "callbacks=ema with trainer=fsdp: each process has a share of the parameters; use "
            "trainer=ddp"
        )
    decay = None if average is None else average.decay
    if start.checkpoint is not None and start.average_decay != decay:
        before = "none" if start.average_decay is None else f"decay={start.average_decay:g}"
        now = "none" if decay is None else f"decay={decay:g}"
        raise InputError(
            f"resume={resume}: the average of weights (callbacks=ema) is {before} in that run, not "
            f"{now}; a resumed run keeps it"
        )


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """Return what is averaged: everything trained, and the statistics of norms, each once."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in module.named_buffers() if name.endswith(_STATISTICS)}
    return {**trained, **buffers}


def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    own = _averaged(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
