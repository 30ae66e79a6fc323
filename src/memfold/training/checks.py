"""Values of the configuration that no object checks with a message of its own."""

import math
from collections.abc import Callable
from typing import Any

from memfold.errors import InputError

__all__ = ["GROUPS", "check_config"]

GROUPS = (
    "backbone",
    "compression",
    "data",
    "task",
    "optimizer",
    "scheduler",
    "trainer",
    "logger",
    "callbacks",
)
_SINGLE_KEYS = (
    "ratio",
    "budget_bytes",
    "artifact",
    "distill",
    "seed",
    "resume",
    "checkpoint",
    "sweep",
    "test_checkpoint",
    "extras",
)
_MAX_SEED = 2**32 - 1  # NumPy's limit


def check_config(config: dict[str, Any]) -> None:
    """Check what the whole configuration must have, whatever was chosen.

    Args:
        config: The resolved configuration, plain values.

    Raises:
        InputError: A key is unknown, a group is missing, or a value is not allowed.
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
    ratio, budget = config["ratio"], config["budget_bytes"]
    if ratio is not None and budget is not None:
        raise InputError(f"ratio={ratio} and budget_bytes={budget} are both given; give one")
    for key, is_allowed, allowed in _RULES:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT and not is_allowed(value):
            raise InputError(f"{key} must be {allowed}, got {value!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_not_negative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_null_or_positive(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


def _is_distill(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"teacher", "temperature", "weight", "allow"}


def _is_checkpoint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"asynchronous"}
        and isinstance(value["asynchronous"], bool)
    )


_ABSENT = object()
_NOT_NEGATIVE = "a number of at least 0"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("ratio", lambda v: v is None or _is_number(v), "a number in (0, 1] or null"),
    (
        "seed",
        lambda v: _is_whole(v) and 0 <= v <= _MAX_SEED,
        f"a whole number from 0 to {_MAX_SEED}",
    ),
    ("distill", _is_distill, "teacher, temperature, weight, allow: ... and nothing else"),
    (
        "distill.teacher",
        lambda v: v is None or (isinstance(v, str) and v != ""),
        "a run folder or null",
    ),
    (
        "distill.allow",
        lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "a list of dotted paths such as [pkg.mod.Net]",
    ),
    ("distill.temperature", lambda v: _is_number(v) and v > 0, "a number above 0"),
    ("distill.weight", lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    ("checkpoint", _is_checkpoint, "asynchronous: true or false, and nothing else"),
    ("test_checkpoint", lambda v: v in ("last", "best"), "last or best"),
    ("trainer.max_epochs", _is_count, "a whole number above 0"),
    ("trainer.accumulate_grad_batches", _is_count, "a whole number above 0"),
    ("trainer.gradient_clip_val", _is_null_or_positive, "a number above 0 or null"),
    ("trainer.limit_train_batches", _is_null_or_positive, "a number above 0 or null"),
    ("optimizer.lr", _is_not_negative, _NOT_NEGATIVE),
    ("optimizer.weight_decay", _is_not_negative, _NOT_NEGATIVE),
    ("optimizer.momentum", _is_not_negative, _NOT_NEGATIVE),
)
