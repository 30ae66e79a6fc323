"""Flat names for W&B: what can be searched, filtered and put into a column.

A key of the configuration keeps its name on the command line, such as `optimizer.lr`: the agent
of a W&B sweep logs its parameters under that name too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from memfold.runs.primary import ACCURACY, primary_of

__all__ = ["flat_facts", "flat_settings", "flat_summary"]

# Not what was trained, or told by the facts under a better name; `ratio` there is the one that
# came out.
_LEFT_OUT = (
    "artifact",
    "budget_bytes",
    "checkpoint",
    "compression.bits",
    "compression.budget_bytes",
    "compression.ratio",
    "compression.seed",
    "data.download",
    "data.root",
    "distill.teacher",
    "extras",
    "logger",
    "ratio",
    "resume",
    "sweep",
)
_NUMBERS = ("memory", "parameters", "time", "training", "compute")
_GROUPS = (
    "callbacks",
    "compression",
    "data",
    "experiment",
    "optimizer",
    "scheduler",
    "task",
    "trainer",
)
_BYTES = (
    "dense_bytes",
    "value_bytes",
    "index_bytes",
    "untouched_bytes",
    "stored_bytes",
    "stored_ratio",
)


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as `group.key` -> value.

    Targets, places of files and what changes nothing in the training are left out.

    Args:
        config: The resolved configuration, plain values.
    """
    is_distilled = bool((config.get("distill") or {}).get("teacher"))
    return {
        key: value
        for key, value in _leaves(config)
        if not any(key == name or key.startswith(f"{name}.") for name in _LEFT_OUT)
        and (is_distilled or not key.startswith("distill."))
    }


def flat_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is, by short names.

    Args:
        facts: As in `result.json`, with `choices` of Hydra's groups and `labels` where they are
            known. What is missing is left out.
    """
    compression, memory = facts["compression"], facts.get("memory") or {}
    parameters, environment = facts.get("parameters") or {}, facts.get("environment") or {}
    choices, labels = facts.get("choices") or {}, facts.get("labels")
    teacher = (facts.get("distill") or {}).get("teacher")
    names = ("method", "setting", "data")
    named = {} if labels is None else {name: getattr(labels, name) for name in names}
    return {
        **{group: choices[group] for group in _GROUPS if choices.get(group) is not None},
        "strategy": compression["name"],
        "ratio": compression["ratio"],
        "requested_ratio": compression["requested_ratio"],
        "budget_bytes": compression["budget_bytes"],
        "bits": compression["bits"],
        "backbone": facts["backbone"],
        "data": facts["data"],
        **named,
        "task": facts["task"],
        "seed": facts["seed"],
        **({} if teacher is None else _teacher(teacher)),
        **{key: memory[key] for key in _BYTES if key in memory},
        **{f"parameters.{key}": value for key, value in parameters.items()},
        **{f"environment.{key}": value for key, value in environment.items()},
    }


def flat_summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the final numbers of a completed run.

    The primary metric, `accuracy` of a classification, is that of what is stored on the test split:
    with fewer than 32 bits, of the artifact.
    """
    metrics, primary = result["metrics"], primary_of(result)
    groups = {key: result.get(key, {}) for key in _NUMBERS}
    final = {
        "accuracy" if primary == ACCURACY else primary.short: primary.tested(metrics),
        "ratio": result["compression"]["ratio"],
        "epochs": result["epochs"],
        **metrics,
        **{f"{name}/{key}": item for name, group in groups.items() for key, item in group.items()},
    }
    return {key: value for key, value in final.items() if value is not None}


def _teacher(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the teacher is, not where it lies."""
    options = teacher.get("compression") or {}
    return {
        "distill.teacher.backbone": teacher.get("backbone"),
        "distill.teacher.strategy": options.get("name"),
        "distill.teacher.ratio": options.get("ratio"),
        "distill.teacher.seed": teacher.get("seed"),
    }


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if "dirpath" in config:  # it writes checkpoints
        return
    for key, value in config.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
