"""A resumed run keeps every setting that its weights depend on."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memfold.errors import InputError

__all__ = ["refuse_other_experiment", "refuse_other_total_batch"]

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


def refuse_other_experiment(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that `now` would train the same weights as `before`.

    Where it runs, how it is watched and how long it trains may differ.

    Args:
        folder: The run folder, for the message.
        before: The resolved configuration of the run, plain values.
        now: The one it shall be resumed with.

    Raises:
        InputError: A setting differs.
    """
    values = [dict(_leaves(config)) for config in (before, now)]
    for key in sorted(values[0].keys() | values[1].keys(), key=_most_telling_first):
        old, new = (v.get(key, _NOT_SET) for v in values)
        if old != new and not _may_differ(key):
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


def _leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict) or (prefix and not value):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _most_telling_first(key: str) -> tuple[bool, int, str]:
    """Name the choice rather than its options, and `seed` rather than `data.seed`."""
    return not key.endswith("_target_"), key.count("."), key


def _may_differ(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _MAY_DIFFER)


def _num_processes(config: dict[str, Any]) -> int | None:
    """Return the number of processes; `None` when it depends on the machine."""
    trainer = config["trainer"]
    devices = trainer.get("devices", 1)
    factors = [len(devices) if isinstance(devices, list) else devices, trainer.get("num_nodes", 1)]
    if not all(isinstance(factor, int) and factor > 0 for factor in factors):
        return None
    return math.prod(factors)
