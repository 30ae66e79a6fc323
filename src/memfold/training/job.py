"""One job: build, fit, test, save, and a result in every case."""

import logging
import os
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

import memfold
from memfold.compression import compression_of
from memfold.data.own_files import checksum_of
from memfold.errors import InputError
from memfold.files import write_text_atomically, writing
from memfold.logging.loggers import ContinuedSteps
from memfold.logging.quiet import hush_libraries
from memfold.logging.wandb_run import WandbRun, close_wandb
from memfold.processes.lightning_internals import lighten_steps, release_children
from memfold.processes.ranks import declare_parent, is_rank_zero
from memfold.processes.termination import Termination, heeding_sigterm
from memfold.runs.folder import (
    ARTIFACT,
    HYDRA_FOLDER,
    read_result,
    refuse_used_folder,
    remove_partial_files,
)
from memfold.runs.locks import locked
from memfold.runs.recorded import read_config
from memfold.runs.result import ResultFile, describe_job
from memfold.runs.resume import resume_command
from memfold.runs.same_experiment import keep_settings, refuse_other_experiment
from memfold.training.build import (
    Experiment,
    build,
    next_round,
    plain_config,
)
from memfold.training.compute import describe_compute
from memfold.training.config_rules import check_config
from memfold.training.language_results import describe_text, tokenizer_bytes
from memfold.training.load import read_run_checkpoint
from memfold.training.networks import build_backbone
from memfold.training.preemption import Preemption
from memfold.training.round_tracker import total_of
from memfold.training.summary import print_summary
from memfold.training.weight_average import average_of

__all__ = ["run_job"]

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> dict[str, Any]:
    """Run one job in Hydra's output folder; see `memfold.training.run`."""
    hush_libraries()
    declare_parent(os.environ)  # the other ranks inherit it from Lightning's launcher
    folder = Path(HydraConfig.get().runtime.output_dir)
    with heeding_sigterm() as termination:
        if not is_rank_zero():  # rank 0 has the lock, and starts the others
            if cfg.resume is not None:
                keep_settings(cfg, folder)
            return _run_locked(cfg, folder, termination)
        with locked(folder):
            _admit(cfg, folder)
            return _run_locked(cfg, folder, termination)


def _admit(cfg: DictConfig, folder: Path) -> None:
    """Refuse what would spoil an earlier run, before anything is written."""
    if cfg.resume is None:
        refuse_used_folder(folder)
        return
    if not Path(cfg.resume).is_dir() or not folder.samefile(cfg.resume):
        raise InputError(f"resume={cfg.resume} is not the run folder {folder}")
    try:
        before = read_config(folder, ())
        given = keep_settings(cfg, folder)
    except InputError as error:
        raise InputError(f"resume={folder}: {error}") from error
    now = plain_config(cfg)
    check_config(now)
    refuse_other_experiment(folder, before, now, given)
    remove_partial_files(folder)


def _run_locked(cfg: DictConfig, folder: Path, termination: Termination) -> dict[str, Any]:
    facts = describe_job(cfg)
    if cfg.resume is not None:  # its weights are not read again
        before = read_result(folder)
        facts |= {key: before.get(key) for key in ("init_from", "data_checksum")}
    result_file = ResultFile(folder, facts)
    completed = False
    try:
        result_file.begin()
        if is_rank_zero():
            log.info("%s", facts["command"])
            print(f"run folder: {folder}", flush=True)
        experiment = build(cfg, folder)
        checksum = checksum_of(experiment.data.own_files())
        if facts.get("data_checksum") not in (None, checksum):
            raise InputError(
                f"resume={folder}: files of data={facts['data']} have changed since it began; "
                f"start a new run on them, from its weights with init_from={folder}"
            )
        facts["data_checksum"] = checksum
        result_file.add({"data_checksum": checksum})
        if is_rank_zero():
            with writing(folder):
                experiment.data.write_facts(folder)
        built = _describe_built(experiment, facts)
        result_file.add(built)
        _announce(experiment, {**facts, **built})
        result_file.add(_train(experiment, cfg, result_file, termination))
        result_file.add(_describe_built(experiment, facts))  # rounds change the counts
        result_file.add({**experiment.data.describe(), **describe_compute(experiment)})
        result_file.add(describe_text(experiment))
        result = result_file.complete()
        completed = True
        for logger in experiment.trainer.loggers:
            if isinstance(logger, ContinuedSteps):
                logger.conclude(result, folder / ARTIFACT)
    except SIGTERMException:
        then = "it was completed" if completed else f"continue with: {resume_command(folder)}"
        reason = f"terminated (SIGTERM); {then}"
        with suppress(InputError):
            result_file.fail(reason)
        if is_rank_zero():
            log.warning("%s", reason)
        release_children()
        raise SystemExit(termination.exit_status) from None
    except BaseException as error:
        explained = _explain(error)
        with suppress(InputError):  # a full disk: the result says failed since the beginning
            result_file.fail(_reason(explained))
        log.info("failed: %s", _reason(explained))
        if explained is error:
            raise
        raise explained from error
    finally:
        sync_command = close_wandb(failed=not completed)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if is_rank_zero():
        print_summary(result, str(folder))
        if sync_command is not None:
            print(f"W&B was offline; upload with: {sync_command}")
    return result


def _announce(experiment: Experiment, facts: dict[str, Any]) -> None:
    if is_rank_zero():
        # The compression's own strategy has decided what options leave open.
        built = getattr(compression_of(experiment.net), "strategy", experiment.strategy)
        log.info("%s: %s", experiment.folder, built.to_dict())
        log.info("%s", experiment.footprint)
        start = experiment.start
        if start.step:
            done = f"{start.step:,} steps, in epoch {start.num_epochs}"
            print(f"resumed after {done}", flush=True)
        if experiment.initial is not None:
            log.info("%s", experiment.initial.describe())
            print(experiment.initial.describe(), flush=True)
        if facts["structured"]:
            names = ", ".join(facts["structured"])
            log.info("no noise at the start, so left untouched (structured=keep): %s", names)
    for logger in experiment.trainer.loggers:
        logger.log_hyperparams(experiment.config)
        if isinstance(logger, WandbRun):
            choices = HydraConfig.get().runtime.choices
            more = {"memory": asdict(experiment.footprint), "labels": experiment.labels}
            logger.describe({**facts, **more, "choices": dict(choices)})


def _train(
    experiment: Experiment, cfg: DictConfig, result_file: ResultFile, termination: Termination
) -> dict[str, Any]:
    """Train all rounds that are left, of which there is one for most strategies."""
    while True:
        rounds = experiment.rounds
        earlier = [] if rounds is None else rounds.folder.results()
        if rounds is not None:
            result_file.add({"rounds": earlier})
            result_file.begin()
        _fit(experiment, cfg, termination)
        begin = None if rounds is None else rounds.decide()
        result = _finish(experiment)
        if rounds is None or begin is None:
            results = [*earlier, result]
            return total_of(results) | ({} if rounds is None else {"rounds": results})
        if is_rank_zero():
            rounds.folder.commit(result, rounds.rewound(begin, experiment.trainer))
        experiment.trainer.strategy.barrier()
        experiment = next_round(experiment)


def _fit(experiment: Experiment, cfg: DictConfig, termination: Termination) -> None:
    trainer_callbacks: list[Callback] = experiment.trainer.callbacks  # pyright: ignore
    trainer_callbacks.append(Preemption(termination, experiment.folder, experiment.trainer))
    if cfg.resume is not None:
        # Only now has the checkpoint been restored; a failure before leaves .hydra as it is.
        record = LambdaCallback(on_train_start=lambda *_: _record_overrides(cfg, experiment.folder))
        trainer_callbacks.insert(0, record)
    lighten_steps(experiment.trainer)
    try:
        experiment.trainer.fit(
            experiment.module,
            datamodule=experiment.data,
            ckpt_path=experiment.start.checkpoint,
            weights_only=True,
        )
    except SystemExit as stop:
        # Lightning shuts down after Ctrl-C and then exits; the caller should know why.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except ValueError as error:  # PyTorch's, of an optimizer's state
        if "parameter group" not in str(error):
            raise
        raise InputError(
            f"resume: {experiment.start.checkpoint} has an optimizer with other groups of "
            "parameters (optimizer.decay, or written by an older memfold); start a new run"
        ) from error
    # What Lightning does where max_epochs is reached, and not where a run had stopped early.
    progress: Any = experiment.trainer.fit_loop.epoch_progress.current
    progress.completed = progress.processed
    if cfg.resume is not None:  # nothing may have been left to train
        _record_overrides(cfg, experiment.folder)


def _finish(experiment: Experiment) -> dict[str, Any]:
    """Save the artifact, test once, and collect what goes into the result of a round."""
    trainer, module, data = experiment.trainer, experiment.module, experiment.data
    if trainer.global_step == 0:
        raise InputError("trainer.max_time or a callback stopped the run before its first step")
    memory = experiment.memory.measure(experiment.net)  # before the test set is read
    num_epochs = max(trainer.current_epoch, experiment.start.num_epochs)
    metrics = _metrics(trainer)
    if not experiment.validation.is_up_to_date(trainer):  # nothing was left to train, or a stop
        metrics |= _validate(experiment)
    best = _best_checkpoint(trainer)
    if best is not None and best.best_model_score is not None:
        split, _, metric = str(best.monitor).partition("/")
        metrics[f"{split}/best_{metric}"] = float(best.best_model_score)
    use_best = experiment.config["test_checkpoint"] == "best"
    if use_best and (best is None or not best.best_model_path):
        raise InputError("test_checkpoint=best needs a callback that keeps the best of a metric")
    if use_best and best is not None:
        trainer.strategy.barrier()  # rank 0 may have written it after the last step
        read_run_checkpoint(Path(best.best_model_path), module)
        checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
        metrics |= _validate(experiment)
    # Saved first: a damaged test set loses no trained weights.
    artifact = experiment.folder / ARTIFACT
    if trainer.is_global_zero:
        with writing(artifact):
            memfold.save(experiment.net, artifact, data=experiment.feedback_samples)
        last = {"artifact_bytes": artifact.stat().st_size, **tokenizer_bytes(experiment)}
        memory |= last
        for logger in trainer.loggers:
            named = {f"memory/{key}": float(value) for key, value in last.items()}
            logger.log_metrics(named, trainer.global_step)
    trainer.test(module, datamodule=data, verbose=False)
    metrics |= _metrics(trainer)
    if experiment.strategy.is_lossy:
        metrics |= _evaluate_artifact(experiment)
    rounds, counts = experiment.rounds, memfold.footprint(experiment.net)
    first_step = 0 if rounds is None else rounds.first_step
    return {
        "round": 0 if rounds is None else rounds.number,
        "ratio": counts.ratio,
        "num_values": counts.num_values,
        "first_step": first_step,
        "steps": trainer.global_step - first_step,
        "epochs": num_epochs,
        "metrics": metrics,
        "memory": memory,
        "time": experiment.timer.metrics,
    }


def _validate(experiment: Experiment) -> dict[str, float]:
    """Measure the weights as they are, for the result alone: the loggers have what was trained."""
    trainer, loggers = experiment.trainer, experiment.trainer.loggers
    trainer.loggers = []
    try:
        trainer.validate(experiment.module, datamodule=experiment.data, verbose=False)
    finally:
        trainer.loggers = loggers
    return _metrics(trainer)


def _evaluate_artifact(experiment: Experiment) -> dict[str, float]:
    """Measure what the artifact itself, with its values in fewer bits, is worth."""
    trainer, module = experiment.trainer, experiment.module
    trainer.strategy.barrier()  # rank 0 has written it
    packed = build_backbone(experiment.config["backbone"], module.task.spec)
    memfold.load(experiment.folder / ARTIFACT, packed)
    metrics, trained = {}, experiment.net
    module.net = packed
    vars(module)["metric_prefix"] = "packed/"
    try:
        for evaluate in (trainer.validate, trainer.test):
            evaluate(module, datamodule=experiment.data, verbose=False)
            metrics |= _metrics(trainer)
    finally:
        module.net = trained
        vars(module)["metric_prefix"] = ""
    return metrics


def _best_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return next((c for c in checkpoints if c.monitor is not None), None)


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {key: float(v) for key, v in trainer.callback_metrics.items() if "/" in key}


def _describe_built(experiment: Experiment, facts: dict[str, Any]) -> dict[str, Any]:
    counts, average = memfold.footprint(experiment.net), average_of(experiment.trainer)
    device = experiment.trainer.strategy.root_device
    options, compression = experiment.strategy.to_dict(), compression_of(experiment.net)
    primary, initial = experiment.module.task.primary, experiment.initial
    return {
        **({} if initial is None else {"init_from": initial.report}),
        "data_source": experiment.data.source,
        "compression": {
            **options,
            "ratio": counts.ratio,
            "requested_ratio": experiment.strategy.requested_ratio,
            "index_format": compression.index_format if compression is not None else None,
        },
        "parameters": {
            "dense": experiment.num_dense_parameters,
            "compressible": counts.num_weights,
            "trained": sum(p.numel() for p in experiment.net.parameters() if p.requires_grad),
        },
        "structured": list(compression.structured) if compression is not None else [],
        "task": experiment.module.task.name,
        "primary": {"name": f"val/{primary.name}", "mode": primary.mode, "unit": primary.unit},
        "test_checkpoint": experiment.config["test_checkpoint"],
        "max_epochs": experiment.config["trainer"]["max_epochs"],
        "distill": experiment.distill,
        "feedback_samples": experiment.config["artifact"]["feedback_samples"],
        "ema": None if average is None else {"decay": average.decay},
        "environment": {
            **facts["environment"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "world_size": experiment.trainer.world_size,
        },
    }


def _record_overrides(cfg: DictConfig, folder: Path) -> None:
    """Let `.hydra` describe the resumed run, now that its checkpoint has been accepted."""
    if not is_rank_zero():
        return
    task = [text for text in HydraConfig.get().overrides.task if not text.startswith("resume=")]
    job = OmegaConf.merge(cfg, {"resume": None})
    write_text_atomically(folder / HYDRA_FOLDER / "overrides.yaml", yaml.safe_dump(task))
    write_text_atomically(folder / HYDRA_FOLDER / "config.yaml", OmegaConf.to_yaml(job))


def _explain(error: BaseException) -> BaseException:
    """Return one line in place of what the libraries say about a user's mistake."""
    is_about_batches = isinstance(error, ValueError) and "val_check_interval" in str(error)
    if isinstance(error, MisconfigurationException) or is_about_batches:
        return InputError(" ".join(f"trainer: {error}".split()))
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first = " ".join(" ".join(str(error).splitlines()[:2]).split())
        return InputError(f"trainer.compile: torch.compile failed ({first}); leave it at false")
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    is_lost = isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    if is_lost or isinstance(error, torch.distributed.DistError):
        return InputError(
            "another process of this run died, or cannot be reached; its own message stands above "
            "if it left one (debug=trace shows where this process was)"
        )
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C)"
    return "".join(traceback.format_exception_only(error))
