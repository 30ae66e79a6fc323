"""Where Lightning's choices for several processes are not enough for a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from memfold.compression import Strategy
from memfold.errors import InputError
from memfold.processes.external_launch import external_launch
from memfold.strategies import strategy_class, strategy_names
from memfold.training.instantiate import instantiate

__all__ = [
    "Unshard",
    "cluster_environment",
    "refuse_batchnorm_on_cpus",
    "refuse_unsuitable_shards",
    "whole_parameters",
]


def cluster_environment() -> ClusterEnvironment | None:
    """Return what starts the processes of a run on a SLURM cluster.

    Lightning's own answer to preemption is off: it would save a second checkpoint beside ours and
    requeue the job, which SLURM does by itself.

    Returns:
        `None` off SLURM and under torchrun: Lightning then finds out by itself.
    """
    launch = external_launch(os.environ)
    if launch is None and "SLURM_NTASKS" in os.environ:
        return LightningEnvironment()  # one task, which starts a process per device
    if launch is not None and launch.name == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return None


def refuse_batchnorm_on_cpus(trainer: Trainer, config: dict[str, Any]) -> None:
    """Check that BatchNorm can be synchronised if that is asked for.

    Raises:
        InputError: It cannot.
    """
    device = trainer.strategy.root_device.type
    if config["trainer"].get("sync_batchnorm") and trainer.world_size > 1 and device == "cpu":
        raise InputError(
            "trainer.sync_batchnorm=true: torch synchronises BatchNorm on GPUs only; without it, "
            "each process normalises by its own share of the batch"
        )


def refuse_unsuitable_shards(config: dict[str, Any]) -> None:
    """Check that the parameters of what is asked for can be sharded, if they are to be.

    Args:
        config: The resolved configuration, plain values; nothing is built.

    Raises:
        InputError: They cannot.
    """
    named = config["trainer"].get("strategy")
    target = named.get("_target_") if isinstance(named, dict) else named
    if "fsdp" not in str(target).lower():
        return
    strategy: Strategy = instantiate(config["compression"], "compression")
    if strategy.unshardable is not None:
        others = [name for name in strategy_names() if strategy_class(name).unshardable is None]
        raise InputError(
            f"trainer=fsdp with compression={strategy.name}: {strategy.unshardable} "
            f"(fsdp is for {', '.join(others)})"
        )
    if strategy.train_bits is not None:
        raise InputError(
            "artifact.train_bits rounds whole tensors, and trainer=fsdp has shares of them in each "
            "process; use trainer=ddp"
        )
    if config["trainer"].get("gradient_clip_val") is not None:
        raise InputError(
            "trainer.gradient_clip_val: Lightning cannot clip the gradients of trainer=fsdp, of "
            "which each process has a share; use trainer=ddp"
        )


@contextmanager
def whole_parameters(trainer: Trainer) -> Iterator[None]:
    """Gather sharded parameters for the block; all ranks must enter it."""
    model = trainer.strategy.model
    if not isinstance(model, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield


class Unshard(Callback):
    """After a sharded training or evaluation, put a whole network into the task.

    What comes then, such as the artifact, needs one, and torch cannot take the shards out of the
    modules again. Until then every rank keeps a second network, on the CPU.
    """

    def __init__(self) -> None:
        self._whole: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the network before it is sharded."""
        if isinstance(trainer.strategy, FSDPStrategy):
            net = pl_module.net
            assert isinstance(net, nn.Module)
            self._whole = deepcopy(net)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the values into the copy, and the copy in the place of the shards."""
        if self._whole is None:
            return
        net = pl_module.net
        assert isinstance(net, nn.Module)
        with whole_parameters(trainer):
            self._whole.load_state_dict(net.state_dict())
        pl_module.net = self._whole
        self._whole = None
