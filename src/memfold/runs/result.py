"""`result.json`: what a run was and what came out of it."""

import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.files import write_text_atomically
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import RESULT, read_result

__all__ = ["UNFINISHED", "ResultFile", "describe_environment", "describe_job", "without_nonfinite"]

_OF_NO_EFFECT = {"data.root", "data.seed", "data.download"}

UNFINISHED = "not finished: still running, or killed before the end"


class ResultFile:
    """The `result.json` of one run. Rank 0 writes; a completed result is never taken back."""

    def __init__(self, folder: Path, facts: dict[str, object]) -> None:
        """Prepare to write; nothing is written yet.

        Args:
            folder: The run folder.
            facts: What is known before the run: command, seed, compression, ...
        """
        self._path = folder / RESULT
        self._facts = facts

    def begin(self) -> None:
        """Leave a failed result, which stays when the process is killed."""
        self.fail(UNFINISHED)

    def fail(self, reason: str) -> None:
        """Write that the run failed and why, unless an earlier run here was completed."""
        if read_result(self._path.parent).get("status") != "completed":
            self._write({"status": "failed", "error": " ".join(reason.split()), **self._facts})

    def add(self, facts: dict[str, object]) -> None:
        """Add to, or replace, what is written from now on."""
        self._facts = {**self._facts, **facts}

    def complete(self) -> dict[str, object]:
        """Write that the run was completed, and return all that was written."""
        result = {"status": "completed", **self._facts}
        self._write(result)
        return result

    def _write(self, result: dict[str, object]) -> None:
        if is_rank_zero():
            text = json.dumps(without_nonfinite(result), indent=2, allow_nan=False)
            write_text_atomically(self._path, text + "\n")


def describe_job(cfg: DictConfig) -> dict[str, Any]:
    """Collect what is known of a job before anything is built."""
    choices = HydraConfig.get().runtime.choices
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # reported when the job is built
        config = OmegaConf.to_container(cfg)
    assert isinstance(config, dict)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": config.get("seed"),
        "compression": {
            "name": choices.get("compression"),
            "ratio": config.get("ratio"),
            "budget_bytes": config.get("budget_bytes"),
        },
        "backbone": _name_backbone(config.get("backbone"), choices.get("backbone")),
        "data": choices.get("data"),
        "task": choices.get("task"),
        "recipe": _describe_recipe(config, choices),
        "environment": {**describe_environment(), "device": None, "world_size": None},
        # Known when the run is completed; a failed one has the keys too.
        "data_source": None,
        "init_from": None,
        "distill": None,
        "ema": None,
        "feedback_samples": None,
        "primary": None,
        "epochs": None,
        "max_epochs": None,
        "training": None,
        "metrics": None,
        "parameters": None,
        "memory": None,
        "time": None,
    }


def _name_backbone(options: object, choice: str | None) -> str | None:
    """Return the choice and, of those that stand for many networks, which one it is."""
    options = options if isinstance(options, Mapping) else {}
    if options.get("target"):
        return str(options["target"])
    return f"{choice} {options['name']}" if options.get("name") else choice


def _describe_recipe(config: Mapping[Any, Any], choices: Mapping[str, Any]) -> dict[str, object]:
    """Return what decides how the network is trained, named as on the command line."""
    recipe: dict[str, object] = {k: config.get(k) for k in ("init_from", "init_layers")}
    for group in ("backbone", "data", "optimizer", "scheduler", "task"):
        if group in ("optimizer", "scheduler"):
            recipe[group] = choices.get(group)
        options = config.get(group)
        for key, value in options.items() if isinstance(options, Mapping) else ():
            if not str(key).startswith("_") and f"{group}.{key}" not in _OF_NO_EFFECT:
                recipe[f"{group}.{key}"] = value
    trainer = config.get("trainer")
    for key in ("accumulate_grad_batches", "gradient_clip_val", "precision"):
        recipe[f"trainer.{key}"] = trainer.get(key) if isinstance(trainer, Mapping) else None
    return recipe


def describe_environment() -> dict[str, object]:
    """Versions and the state of the source tree; `None` where it cannot be known."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit is not None else None
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "lightning": _version("lightning"),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def without_nonfinite(value: object) -> object:
    """Replace NaN and infinities, which JSON does not know, by `None`."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
