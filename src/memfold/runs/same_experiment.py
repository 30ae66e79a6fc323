"""A resumed run keeps every setting that its weights depend on."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.overrides import parse, unresolved
from memfold.runs.recorded import leaves_of, read_overrides, read_settings

__all__ = ["keep_settings", "refuse_other_experiment", "refuse_other_total_batch"]

_MAY_DIFFER = (
    "resume",
    "sweep",
    "checkpoint",
    "test_checkpoint",
    "extras",
    "logger",
    "callbacks",
    "data.root",
    "data.download",
    "data.batch_size",  # the batch of all processes together must not
    "distill.allow",
    "distill.teacher",  # may have moved; training.teacher compares what is in it
    "trainer.accelerator",
    "trainer.activation_checkpointing",
    "trainer.benchmark",
    "trainer.detect_anomaly",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",
    "trainer.num_nodes",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "trainer.strategy",
)
_NOT_SET = "not set"
_NOW = {  # what gives the same where it was named before
    "memfold.backbones.MLP": "memfold.backbones.build_mlp",
    "memfold.tasks.Classification": "memfold.tasks.task_for",
}


def keep_settings(cfg: DictConfig, folder: Path) -> frozenset[str]:
    """Give `cfg`, in place, the settings of the run where this command says nothing of them.

    It was composed with the defaults of today, which may have been others when the run was started.

    Args:
        cfg: The configuration that the run shall be resumed with.
        folder: The run folder, whose configuration can be read.

    Returns:
        Dotted keys and sections that the command sets, and the run's own did not set so.

    Raises:
        InputError: The run's overrides are missing or damaged.
    """
    given = _given(cfg, folder)
    before = read_settings(folder)
    for key, value in leaves_of(OmegaConf.to_container(cfg, resolve=False)):
        follows_another = isinstance(value, str) and "${" in value
        if key in before and not follows_another and not _is_below(key, given):
            OmegaConf.update(cfg, key, before[key], merge=False)
    return given


def refuse_other_experiment(
    folder: Path, before: dict[str, Any], now: dict[str, Any], given: Collection[str] = ()
) -> None:
    """Check that `now` would train the same weights as `before`.

    Where it runs, how it is watched and how long it trains may differ.

    Args:
        folder: The run folder, for the message.
        before: The resolved configuration of the run, plain values.
        now: The one it shall be resumed with.
        given: See `keep_settings`. Other options that the run has not are younger than it, and
            their defaults do what was done before.

    Raises:
        InputError: A setting differs.
    """
    values = [dict(leaves_of(config)) for config in (before, now)]
    for key in sorted(values[0].keys() | values[1].keys(), key=_most_telling_first):
        old, new = (_renamed(key, v.get(key, _NOT_SET)) for v in values)
        is_younger = key not in values[0] and not _is_below(key, given)
        if old != new and not is_younger and not _is_below(key, _MAY_DIFFER):
            raise InputError(_message(folder, key, old, new))
    old_size, new_size = (config["data"].get("batch_size") for config in (before, now))
    old_number, new_number = (_num_processes(config) for config in (before, now))
    if isinstance(old_size, int) and isinstance(new_size, int) and old_number and new_number:
        refuse_other_total_batch(folder, old_size * old_number, new_size, new_number)


def refuse_other_total_batch(
    folder: Path, total_batch: int | None, batch_size: int, num_processes: int
) -> None:
    """Check that all processes together take as many samples a step as before.

    Args:
        folder: The run folder, for the message.
        total_batch: Samples in a batch of all processes, before; `None` when nothing has been
            trained.
        batch_size: Per process, now.
        num_processes: Now.

    Raises:
        InputError: They take more or fewer.
    """
    if total_batch is None or total_batch == batch_size * num_processes:
        return
    size, rest = divmod(total_batch, num_processes)
    advice = "(start a new run for another value)"
    if size > 0 and rest == 0:
        advice = f"with data.batch_size={size} on {num_processes} process(es)"
    key = "data.batch_size x trainer.devices x trainer.num_nodes"
    raise InputError(_message(folder, key, total_batch, batch_size * num_processes, advice))


def _renamed(key: str, value: object) -> object:
    return _NOW.get(value, value) if key.endswith("._target_") and isinstance(value, str) else value


def _message(
    folder: Path,
    key: str,
    old: object,
    new: object,
    advice: str = "(start a new run for another value)",
) -> str:
    return (
        f"resume={folder}: {key} is {old} in that run, not {new}; a resumed run keeps it {advice}"
    )


def _given(cfg: DictConfig, folder: Path) -> frozenset[str]:
    before = {o.key_or_group: o.input_line for o in read_overrides(folder)}
    texts = unresolved(HydraConfig.get().overrides.task)
    given = set()
    for override in parse(texts):
        key = override.key_or_group
        if before.get(key) == override.input_line:
            continue
        section = key.partition("/")[0]
        is_of_a_section = section.partition(".")[0] in cfg and override.package is None
        given.add(section if is_of_a_section else "")
    return frozenset(given)


def _most_telling_first(key: str) -> tuple[bool, int, str]:
    """Name the choice rather than its options, and `seed` rather than `data.seed`."""
    return not key.endswith("_target_"), key.count("."), key


def _is_below(key: str, sections: Collection[str]) -> bool:
    """Whether a key is in one of the sections, or is one of them; "" is all of them."""
    return any(section in ("", key) or key.startswith(f"{section}.") for section in sections)


def _num_processes(config: dict[str, Any]) -> int | None:
    """Return the number of processes; `None` when it depends on the machine."""
    trainer = config["trainer"]
    devices = trainer.get("devices", 1)
    factors = [len(devices) if isinstance(devices, list) else devices, trainer.get("num_nodes", 1)]
    if not all(isinstance(factor, int) and factor > 0 for factor in factors):
        return None
    return math.prod(factors)
