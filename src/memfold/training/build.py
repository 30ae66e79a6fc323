"""From a configuration to built objects, in the one order that is right."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

import memfold
from memfold.data.base import ImageDataModule
from memfold.errors import InputError
from memfold.memory import Footprint
from memfold.strategies import Strategy
from memfold.training.callbacks import (
    EpochLog,
    EpochSeeds,
    FiniteLoss,
    MemoryMetrics,
    StepTimer,
)
from memfold.training.checkpoint_io import AtomicCheckpointIO
from memfold.training.checks import check_config
from memfold.training.instantiate import instantiate
from memfold.training.loggers import MetricsFile
from memfold.training.processes import is_rank_zero
from memfold.training.resume import StartingPoint, read_checkpoint
from memfold.training.run_folder import LAST_CHECKPOINT, read_result

__all__ = ["Experiment", "build", "build_network", "plain_config"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """Everything one run needs, built."""

    config: dict[str, Any]
    """The resolved configuration, plain values."""
    folder: Path
    """The run folder."""
    data: ImageDataModule
    net: nn.Module
    """The compressed backbone."""
    strategy: Strategy
    task: LightningModule
    trainer: Trainer
    memory: MemoryMetrics
    timer: StepTimer
    num_dense_parameters: int
    """Of the backbone before compression, each tensor once."""
    footprint: Footprint
    start: StartingPoint


def build(cfg: DictConfig, folder: Path) -> Experiment:
    """Build what `cfg` describes. Nothing below sees an OmegaConf object.

    Data come first, so that their bytes do not count as the model's; then the backbone, whose
    initial values depend on the seed alone; it is compressed before the task, the optimizer and
    DDP know it.

    Args:
        cfg: The composed configuration.
        folder: The run folder.

    Raises:
        InputError: A value is wrong, a file is missing, or the checkpoint to resume from does not
            fit.
    """
    config = plain_config(cfg)
    check_config(config)
    data: ImageDataModule = instantiate(config["data"], "data")
    memory, timer = MemoryMetrics(), StepTimer()
    watchers = [memory, timer, EpochSeeds(config["seed"]), FiniteLoss(), EpochLog()]
    trainer = _build_trainer(config, folder, watchers)
    if is_rank_zero():
        # The other ranks do it in fit, after a barrier: their peak is not reported.
        data.prepare_data()
        data.setup("fit")
    memory.start(trainer.strategy.root_device)
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    net, strategy, num_dense_parameters = build_network(config, data)
    task: LightningModule = instantiate(
        config["task"],
        "task",
        net=net,
        optimizer=_optimizer_factory(config["optimizer"]),
        scheduler=instantiate(config["scheduler"], "scheduler").attach,
        num_classes=data.num_classes,
    )
    start = _starting_point(config, folder, task)
    counts = memfold.footprint(net)
    trainer.loggers = _build_loggers(config, folder, strategy, counts, start.step)
    return Experiment(
        config=config,
        folder=folder,
        data=data,
        net=net,
        strategy=strategy,
        task=task,
        trainer=trainer,
        memory=memory,
        timer=timer,
        num_dense_parameters=num_dense_parameters,
        footprint=counts,
        start=start,
    )


def build_network(config: dict[str, Any], data: ImageDataModule) -> tuple[nn.Module, Strategy, int]:
    """Build the backbone for `data` and compress it.

    Returns:
        The compressed network, the strategy, and the number of parameters before.

    Raises:
        InputError: Backbone or strategy refuse their options, or do not fit each other.
    """
    strategy: Strategy = instantiate(config["compression"], "compression")
    net: nn.Module = instantiate(
        config["backbone"],
        "backbone",
        in_channels=data.num_channels,
        image_size=data.image_size,
        num_classes=data.num_classes,
    )
    num_dense_parameters = sum(parameter.numel() for parameter in net.parameters())
    memfold.compress(net, strategy)
    return net, strategy, num_dense_parameters


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve `cfg` to plain values, without Hydra's own.

    Raises:
        OmegaConfBaseException: A value is missing or cannot be resolved.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    config.pop("hydra", None)
    return {str(key): value for key, value in config.items()}


def _configured_callbacks(config: dict[str, Any]) -> list[Callback]:
    entries = {key: value for key, value in config["callbacks"].items() if value}
    return [instantiate(value, f"callbacks.{key}") for key, value in entries.items()]


def _build_trainer(config: dict[str, Any], folder: Path, watchers: list[Callback]) -> Trainer:
    callbacks = _configured_callbacks(config)
    return instantiate(
        config["trainer"],
        "trainer",
        default_root_dir=folder,
        callbacks=[*watchers, *callbacks],
        logger=False,  # named after the compressed network, which is built later
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )


def _optimizer_factory(config: dict[str, Any]) -> Callable[[Any], Optimizer]:
    return lambda parameters: instantiate(config, "optimizer", params=parameters)


def _starting_point(config: dict[str, Any], folder: Path, task: LightningModule) -> StartingPoint:
    if config["resume"] is None:
        return StartingPoint()
    checkpoint = folder / LAST_CHECKPOINT
    if not checkpoint.exists():
        log.warning("%s has no checkpoint yet: the run starts from the beginning", folder)
        return StartingPoint()
    start = read_checkpoint(checkpoint, task.state_dict())
    epochs, result = config["trainer"]["max_epochs"], read_result(folder)
    if result.get("status") == "completed" and result.get("epochs") == epochs:
        raise InputError(
            f"resume={folder}: the run is completed; trainer.max_epochs={epochs} must be above "
            f"{epochs} to train it further"
        )
    if epochs < start.num_epochs:
        raise InputError(
            f"resume={folder}: trainer.max_epochs={epochs} must be at least {start.num_epochs}, "
            "the epochs that its checkpoint has"
        )
    return start


def _build_loggers(
    config: dict[str, Any],
    folder: Path,
    strategy: Strategy,
    counts: Footprint,
    first_step: int,
) -> list[Logger]:
    ratio = [] if strategy.name == "dense" else [f"{counts.ratio:.3g}"]
    backbone = HydraConfig.get().runtime.choices["backbone"]
    name = "-".join([backbone, strategy.name, *ratio, f"s{config['seed']}"])
    further = instantiate({"tags": [], **config["logger"]}, "logger", folder=folder, run_name=name)
    return [MetricsFile(folder, keep_before_step=first_step), *([further] if further else [])]
