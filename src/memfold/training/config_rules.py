"""What the configuration must look like, beyond the names and types of `signatures`.

A class or function that the configuration names is held against its own signature where it is
built. Here stands what a signature cannot say: which keys there are, and ranges.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from memfold.errors import InputError
from memfold.options import (
    Count,
    Interval,
    Natural,
    NonNegative,
    Positive,
    Share,
    describe,
    fits,
)
from memfold.overrides import GROUPS

__all__ = ["check_config"]

_SINGLE_KEYS = (
    "ratio",
    "budget_bytes",
    "artifact",
    "distill",
    "seed",
    "init_from",
    "init_layers",
    "init_from_strict",
    "resume",
    "checkpoint",
    "sweep",
    "test_checkpoint",
    "extras",
)
_MAX_SEED = 2**32 - 1  # NumPy's limit
_MAX_INTEGER = 2**63 - 1
_MAX_FLOAT = 3.4e38  # of float32, in which networks are trained
_LONGEST_QUOTE = 200
_MAX_BITS = 10_000  # of what Python is willing to print


def check_config(config: dict[str, Any]) -> None:
    """Check what the whole configuration must have, whatever was chosen.

    Args:
        config: The resolved configuration, plain values.

    Raises:
        InputError: A key is unknown or missing, or a value is not allowed.
    """
    known = (*GROUPS, *_SINGLE_KEYS)
    for key in config:
        if key not in known:
            raise InputError(f"{key} is no key of the configuration; keys: {', '.join(known)}")
    for group in GROUPS:
        if not isinstance(config.get(group), dict):
            raise InputError(
                f"{group} must be one of the choices that --help lists, got {config.get(group)!r}"
            )
    for key in _SINGLE_KEYS:
        _refuse_missing(config, key, key)
    _refuse_missing(config["trainer"], "max_epochs", "trainer.max_epochs")
    ratio, budget = config["ratio"], config["budget_bytes"]
    if ratio is not None and budget is not None:
        raise InputError(f"ratio={ratio} and budget_bytes={budget} are both given; give one")
    for pattern, is_allowed, allowed in _RULES:
        for key, value in _matches(config, pattern.split(".")):
            if not is_allowed(value):
                raise InputError(f"{key} must be {allowed}, got {_short(value)}")
    for key, value in _numbers(config, ""):
        largest = _MAX_INTEGER if isinstance(value, int) else _MAX_FLOAT
        if not abs(value) <= largest:  # neither is NaN
            raise InputError(f"{key} must be a number of at most {largest:g}, got {_short(value)}")


def _refuse_missing(group: dict[str, Any], name: str, key: str) -> None:
    if name not in group:
        raise InputError(f"{key} is missing: it can be set to another value, not deleted")


def _matches(value: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Find what a pattern such as callbacks.*.patience names, if there is any."""
    if not parts:
        yield prefix.rstrip("."), value
    elif isinstance(value, dict):
        for key in [key for key in value if parts[0] in ("*", key)]:
            yield from _matches(value[key], parts[1:], f"{prefix}{key}.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float):
        yield key, value


def _short(value: object) -> str:
    is_huge = isinstance(value, int) and value.bit_length() > _MAX_BITS
    text = "a number of thousands of digits" if is_huge else repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."


# Unions of these are written at run time, which type checkers take for arithmetic.
_COUNT: Any = Count
_NATURAL: Any = Natural
_POSITIVE: Any = Positive
_ZERO: Any = Annotated[float, Interval("[0, 0]")]


def _is_off(value: Any) -> bool:
    return value in (None, False, 0)


def _is_part(value: Any) -> bool:
    return fits(value, _COUNT | None) or (isinstance(value, float) and 0 < value <= 1)


def _has_keys(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and value.keys() == set(keys)


_KINDS: dict[str, Any] = {
    "ratio": float | None,
    "artifact.train_bits": int | None,
    "artifact.train_bits_from": Share,
    "artifact.block_size": int,
    "artifact.coding": Literal["none", "huffman"],
    "artifact.untouched_bits": Literal[32, 16],
    "artifact.merge_norms": bool,
    "artifact.feedback_samples": Natural,
    "seed": Annotated[int, Interval(f"[0, {_MAX_SEED}]")],
    "distill.allow": list[str],
    "distill.temperature": Positive,
    "distill.weight": Share,
    "checkpoint.asynchronous": bool,
    "extras.*": bool,
    "init_from_strict": bool,
    "init_layers": list[Natural] | None,
    "resume": str | None,
    "test_checkpoint": Literal["last", "best"],
    "trainer.compile": bool,
    "trainer.activation_checkpointing": str | None,
    "trainer.max_epochs": Count,
    "trainer.max_steps": _COUNT | Literal[-1],
    "trainer.min_epochs": _COUNT | None,
    "trainer.min_steps": _COUNT | None,
    "trainer.num_nodes": Count,
    "trainer.accumulate_grad_batches": Count,
    "trainer.gradient_clip_val": _POSITIVE | None,
    "trainer.check_val_every_n_epoch": _COUNT | None,
    "trainer.num_sanity_val_steps": _NATURAL | Literal[-1],
    "trainer.log_every_n_steps": _NATURAL | None,
    "optimizer.lr": NonNegative,
    "optimizer.weight_decay": NonNegative,
    "optimizer.momentum": Annotated[float, Interval("[0, 1)")],
    "callbacks.*.patience": Natural,
    "callbacks.*.min_delta": NonNegative,
}
_ARTIFACT = ("bits", "train_bits", "train_bits_from", "block_size", "coding", "untouched_bits")
_ARTIFACT += ("merge_norms", "feedback_samples")
_PART = "a number of batches above 0, a share of them in (0.0, 1.0], or null"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *(
        (pattern, functools.partial(fits, annotation=kind), describe(kind))
        for pattern, kind in _KINDS.items()
    ),
    (
        "distill",
        _has_keys("teacher", "temperature", "weight", "allow"),
        "teacher, temperature, weight, allow: ... and nothing else",
    ),
    ("distill.teacher", lambda v: v != "" and fits(v, str | None), "a run folder or null"),
    ("init_from", lambda v: v != "" and fits(v, str | None), "a file, a run folder or null"),
    ("checkpoint", _has_keys("asynchronous"), "asynchronous: true or false, and nothing else"),
    (
        "artifact",
        _has_keys(*_ARTIFACT),
        f"{', '.join(_ARTIFACT)}: ... and nothing else",
    ),
    ("sweep", _has_keys("resume"), "resume: ... and nothing else"),
    ("extras", _has_keys("traceback"), "traceback: true or false, and nothing else"),
    ("trainer.limit_train_batches", _is_part, _PART),
    ("trainer.limit_val_batches", _is_part, _PART),
    (
        "trainer.limit_test_batches",
        lambda v: fits(v, _ZERO) or _is_part(v),
        f"0, {_PART}",
    ),
    ("trainer.val_check_interval", _is_part, _PART),
    (
        "trainer.use_distributed_sampler",
        lambda v: v is False,
        "false: the data modules give each process its share",
    ),
    ("trainer.fast_dev_run", _is_off, "false; debug=fast trains on a few batches"),
    ("trainer.overfit_batches", _is_off, "0; data.train_subset=N overfits N samples"),
    ("trainer.barebones", _is_off, "false: a run logs and saves"),
    (
        "trainer.reload_dataloaders_every_n_epochs",
        _is_off,
        "0: the loader knows its place in the training set",
    ),
)
