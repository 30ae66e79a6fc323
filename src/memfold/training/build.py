"""From a configuration to built objects, in the one order that is right."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    LambdaCallback,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

import memfold
from memfold.compression import Strategy, compression_of
from memfold.compression.error_feedback import SETTING, check_feedback
from memfold.compression.rounds import rounds_of
from memfold.compression.samples import Batch, take_batches
from memfold.data.data_module import DataModule
from memfold.errors import InputError
from memfold.logging.epoch_metrics import EpochMetrics
from memfold.logging.loggers import MetricsFile
from memfold.logging.run_labels import RunLabels, label_run
from memfold.memory import Footprint
from memfold.processes.lightning_internals import hand_over_children
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import LAST_CHECKPOINT, read_result
from memfold.runs.same_experiment import refuse_other_total_batch
from memfold.tasks import Task, TaskModule
from memfold.training.activation_checkpointing import checkpoint_activations
from memfold.training.callbacks import (
    EpochLog,
    FiniteLoss,
    MemoryMetrics,
    StepSeeds,
    StepTimer,
)
from memfold.training.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO
from memfold.training.checkpoint_reading import StartingPoint
from memfold.training.config_rules import check_config
from memfold.training.configured_callbacks import build_callbacks, refuse_wrong_monitors
from memfold.training.distributed import (
    Unshard,
    cluster_environment,
    refuse_batchnorm_on_cpus,
    refuse_unsuitable_shards,
)
from memfold.training.initial_weights import InitialWeights, read_initial_weights
from memfold.training.instantiate import instantiate
from memfold.training.load import read_run_checkpoint
from memfold.training.networks import build_network, build_task
from memfold.training.optimizers import optimizer_factory, refuse_muon_without_matrices
from memfold.training.round_tracker import RoundFolder, RoundTracker
from memfold.training.schedules import Schedule
from memfold.training.structure import Structure
from memfold.training.teacher import (
    describe_distillation,
    load_distillation,
    refuse_other_teacher,
)
from memfold.training.validation import KeptWeightsValidation
from memfold.training.weight_average import refuse_unfit_average

__all__ = [
    "Experiment",
    "build",
    "next_round",
    "plain_config",
]

log = logging.getLogger(__name__)

_OF_THE_NETWORK = ("compile", "activation_checkpointing")
"""Options of `trainer` that are not Lightning's."""


@dataclass(frozen=True)
class Experiment:
    """Everything one run needs, built."""

    config: dict[str, Any]
    """The resolved configuration, plain values."""
    folder: Path
    """The run folder."""
    data: DataModule
    strategy: Strategy
    module: TaskModule
    trainer: Trainer
    memory: MemoryMetrics
    timer: StepTimer
    validation: KeptWeightsValidation
    num_dense_parameters: int
    """Of the backbone before compression, each tensor once."""
    footprint: Footprint
    start: StartingPoint
    rounds: RoundTracker | None
    """`None` for a run of one round."""
    labels: RunLabels
    """What loggers call the run."""
    distill: dict[str, Any] | None
    """The teacher and its weight, for the result."""
    initial: InitialWeights | None
    """What the run has started from, unless its initial values were drawn, or it is resumed."""

    @property
    def net(self) -> nn.Module:
        """The compressed backbone; after a sharded training it is another object than before."""
        return self.module.net

    @property
    def feedback_samples(self) -> list[Batch] | None:
        """Samples for the error feedback of the artifact, `None` without it."""
        count = self.config["artifact"]["feedback_samples"]
        batches = self.data.scoring_batches(self.config["seed"])
        return take_batches(SETTING, batches, num_samples=count) if count else None


def build(cfg: DictConfig, folder: Path) -> Experiment:
    """Build what `cfg` describes. Nothing below sees an OmegaConf object.

    Data come first, so that their bytes do not count as the model's; then the backbone, whose
    initial values depend on the seed alone; it is compressed before the optimizer and DDP know
    it.

    Args:
        cfg: The composed configuration.
        folder: The run folder.

    Raises:
        InputError: A value is wrong, a file is missing, or the checkpoint to resume from does not
            fit.
    """
    config = plain_config(cfg)
    check_config(config)
    refuse_unsuitable_shards(config)
    refuse_muon_without_matrices(config)
    _refuse_to_compile_what_moves(config)
    optimizer = optimizer_factory(config["optimizer"])
    scheduler: Schedule = instantiate(config["scheduler"], "scheduler", Schedule)
    data: DataModule = instantiate(config["data"], "data", DataModule)
    memory, timer, validation = MemoryMetrics(), StepTimer(), KeptWeightsValidation()
    task = build_task(config["task"], data.spec)
    watchers = _watchers(config, task, memory, timer, validation)
    trainer = _build_trainer(config, folder, task, watchers)
    refuse_batchnorm_on_cpus(trainer, config)
    if is_rank_zero():
        # The other ranks do it in fit, after a barrier: their peak is not reported.
        data.prepare_data()
        data.setup("fit")
    memory.start(trainer.strategy.root_device)
    distillation = load_distillation(config, task)  # its draws must not move the initial values
    initial = read_initial_weights(config, folder, task.spec)  # neither may these
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    net, strategy, num_dense_parameters = build_network(
        config, data, task, None if initial is None else initial.fill
    )
    compiles = config["trainer"].get("compile", False)
    pattern = config["trainer"].get("activation_checkpointing")
    if pattern is not None:
        checkpoint_activations(net, pattern, compiles=compiles)
    module = TaskModule(net, task, optimizer, scheduler.attach, distillation, compiles=compiles)
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore
    refuse_wrong_monitors(callbacks, module.directions)
    start = _starting_point(config, folder, module)
    refuse_other_total_batch(folder, start.total_batch, data.batch_size, trainer.world_size)
    rounds = _track_rounds(net, folder, trainer)
    refuse_other_teacher(config, start, distillation)
    refuse_unfit_average(trainer, strategy, start, config["resume"])
    if config["artifact"]["feedback_samples"]:
        check_feedback(compression_of(net), strategy.packing)
    counts = memfold.footprint(net)
    if start.is_new_round:
        _clear_when_all_have_started(trainer, RoundFolder(folder))
    choices = HydraConfig.get().runtime.choices
    labels = label_run(config, choices, strategy, counts, data.source)
    trainer.loggers = _build_loggers(config, folder, labels, start.step)
    return Experiment(
        config=config,
        folder=folder,
        data=data,
        strategy=strategy,
        module=module,
        trainer=trainer,
        memory=memory,
        timer=timer,
        validation=validation,
        num_dense_parameters=num_dense_parameters,
        footprint=counts,
        start=start,
        rounds=rounds,
        labels=labels,
        distill=describe_distillation(config),
        initial=initial,
    )


def _refuse_to_compile_what_moves(config: Mapping[str, Any]) -> None:
    if not config["trainer"].get("compile", False):
        return
    strategy: Strategy = instantiate(config["compression"], "compression", Strategy)
    if strategy.moves_weights:
        raise InputError(
            f"trainer.compile=true: compression={strategy.name} changes its structure while it "
            "trains, at which PyTorch stops compiling; leave it at false"
        )


def next_round(before: Experiment) -> Experiment:
    """Build what trains the next round, after `before` has been committed: a new Trainer.

    Data, network, module and loggers stay; fit restores the network from the checkpoint.
    """
    config, folder = before.config, before.folder
    before.memory.start_round()
    timer, validation = StepTimer(), KeptWeightsValidation()
    task = before.module.task
    watchers = _watchers(config, task, before.memory, timer, validation)
    trainer = _build_trainer(config, folder, task, watchers)
    hand_over_children(before.trainer, trainer)
    rounds = _track_rounds(before.net, folder, trainer)
    if is_rank_zero():
        RoundFolder(folder).clear()
    trainer.loggers = [MetricsFile(folder), *before.trainer.loggers[1:]]
    checkpoint = RoundFolder(folder).start
    start = StartingPoint(checkpoint, is_new_round=True)
    return replace(
        before, trainer=trainer, timer=timer, validation=validation, rounds=rounds, start=start
    )


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve `cfg` to plain values, without Hydra's own.

    Raises:
        OmegaConfBaseException: A value is missing or cannot be resolved.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    config.pop("hydra", None)
    return {str(key): value for key, value in config.items()}


def _watchers(
    config: dict[str, Any],
    task: Task,
    memory: MemoryMetrics,
    timer: StepTimer,
    validation: KeptWeightsValidation,
) -> list[Callback]:
    structure = Structure(task.spec.inputs.example(2))
    others = [Unshard(), StepSeeds(config["seed"]), FiniteLoss(), EpochMetrics(), EpochLog()]
    return [memory, timer, validation, structure, *others]


def _track_rounds(net: nn.Module, folder: Path, trainer: Trainer) -> RoundTracker | None:
    rounds = rounds_of(net)
    if rounds is None:
        return None
    tracker = RoundTracker(rounds, RoundFolder(folder))
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore
    saving = [i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)]
    callbacks.insert(saving[0] if saving else len(callbacks), tracker)
    return tracker


def _clear_when_all_have_started(trainer: Trainer, folder: RoundFolder) -> None:
    """Clear what the round before has left once no other rank looks for its starting point."""

    def clear(trainer: Trainer, _: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            folder.clear()

    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore
    callbacks.insert(0, LambdaCallback(setup=clear))


def _build_trainer(
    config: dict[str, Any], folder: Path, task: Task, watchers: list[Callback]
) -> Trainer:
    callbacks, environment = build_callbacks(config["callbacks"], task), cluster_environment()
    is_asynchronous = config["checkpoint"]["asynchronous"]
    checkpoint_io = AsyncCheckpointIO() if is_asynchronous else AtomicCheckpointIO()
    options = {key: value for key, value in config["trainer"].items() if key not in _OF_THE_NETWORK}
    return instantiate(
        options,
        "trainer",
        Trainer,
        default_root_dir=folder,
        callbacks=[*watchers, *callbacks],
        logger=False,  # named after the compressed network, which is built later
        plugins=[checkpoint_io, *([] if environment is None else [environment])],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )


def _starting_point(config: dict[str, Any], folder: Path, module: TaskModule) -> StartingPoint:
    if config["resume"] is None:
        return StartingPoint()
    start = _newest_start(folder, module)
    if start.checkpoint is None:
        log.warning("%s has no checkpoint yet: the run starts from the beginning", folder)
        return start
    epochs, result = config["trainer"]["max_epochs"], read_result(folder)
    if start.max_epochs is not None and epochs != start.max_epochs:
        raise InputError(
            f"resume={folder}: trainer.max_epochs is {start.max_epochs} in that run, not {epochs}; "
            "a run of several rounds keeps it (start a new run for another value)"
        )
    planned = result.get("max_epochs")  # it may have stopped before
    is_completed = result.get("status") == "completed" and isinstance(planned, int)
    if is_completed and start.num_epochs <= epochs <= planned:
        longer = f"trainer.max_epochs={epochs} must be above {planned} to train it further"
        several = "a run of several rounds cannot be trained further"
        raise InputError(
            f"resume={folder}: the run is completed; "
            + (longer if start.max_epochs is None else several)
        )
    max_steps = config["trainer"].get("max_steps", -1)
    if result.get("status") == "completed" and 0 <= max_steps <= start.step:
        raise InputError(
            f"resume={folder}: the run is completed; trainer.max_steps={max_steps} ends it"
        )
    if epochs < start.num_epochs:
        raise InputError(
            f"resume={folder}: trainer.max_epochs={epochs} must be at least {start.num_epochs}, "
            "the epochs that its checkpoint has"
        )
    return start


def _newest_start(folder: Path, module: TaskModule) -> StartingPoint:
    rounds, checkpoint = RoundFolder(folder), folder / LAST_CHECKPOINT
    if checkpoint.exists():
        start = read_run_checkpoint(checkpoint, module, resumes=True)
        if start.round == rounds.number:
            return start
    if rounds.start is None:
        return StartingPoint()
    return replace(read_run_checkpoint(rounds.start, module, resumes=True), is_new_round=True)


def _build_loggers(
    config: dict[str, Any], folder: Path, labels: RunLabels, first_step: int
) -> list[Logger]:
    options = config["logger"]
    tags = options.get("tags") or []
    if not isinstance(tags, list):
        raise InputError(f"logger.tags must be a list such as [first,second], got {tags!r}")
    options = {**options, "tags": [*labels.tags, *tags]}
    further = instantiate(options, "logger", folder=folder, run_name=labels.name)
    return [MetricsFile(folder, keep_before_step=first_step), *([further] if further else [])]
