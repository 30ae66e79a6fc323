"""The network of a run, from its folder alone: no Hydra, no Trainer, no pickle."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import memfold
from memfold.data.base import ImageDataModule
from memfold.errors import InputError
from memfold.training.build import build_backbone, build_network, read_run_checkpoint
from memfold.training.instantiate import instantiate
from memfold.training.run_folder import ARTIFACT, HYDRA_FOLDER, LAST_CHECKPOINT

__all__ = ["fresh_network", "load_model", "read_data"]

_FILES = {
    "artifact": Path(ARTIFACT),
    "last": LAST_CHECKPOINT,
    "best": LAST_CHECKPOINT.with_name("best.ckpt"),
}


def load_model(
    run_dir: str | os.PathLike[str], weights: Literal["artifact", "last", "best"] = "artifact"
) -> nn.Module:
    """Build the network of a run as its saved configuration says, with the weights it has left.

    Args:
        run_dir: A run folder.
        weights: `artifact` is what the completed run saved; `last` and `best` are checkpoints,
            which an interrupted run has too. To rebuild from a checkpoint a network whose strategy
            looks at data, the data set is read.

    Returns:
        The compressed network, on the CPU and in evaluation mode: images (B, C, H, W), normalised
        as the run's data module does it, to logits (B, classes).

    Raises:
        InputError: The folder is no run folder, the file is missing or damaged, or it is of
            another network than the configuration.
    """
    folder = Path(run_dir)
    if weights not in _FILES:
        raise InputError(f"weights must be one of {', '.join(_FILES)}, got {weights!r}")
    config = _read_config(folder)
    file = folder / _FILES[weights]
    if not file.is_file():
        present = [name for name, path in _FILES.items() if (folder / path).is_file()]
        raise InputError(
            f"{folder} has no {_FILES[weights]}; there are weights={' or '.join(present)}"
            if present
            else f"{folder} has no weights: neither {ARTIFACT} nor a checkpoint"
        )
    data: ImageDataModule = instantiate(config["data"], "data")
    with torch.random.fork_rng():  # initial values are drawn, and replaced
        if weights == "artifact":
            return memfold.load(file, build_backbone(config, data)).eval()
        net, *_ = build_network(config, data)
    return _with_checkpoint(net, file).eval()


def read_data(run_dir: str | os.PathLike[str]) -> tuple[dict[str, Any], ImageDataModule]:
    """Build the data module of a run, and return it after its configuration.

    Raises:
        InputError: The folder is no run folder.
    """
    config = _read_config(Path(run_dir))["data"]
    return config, instantiate(config, "data")


def fresh_network(run_dir: str | os.PathLike[str]) -> nn.Module:
    """Build the dense backbone of a run with new initial weights.

    Raises:
        InputError: The folder is no run folder.
    """
    config = _read_config(Path(run_dir))
    with torch.random.fork_rng():
        return build_backbone(config, instantiate(config["data"], "data"))


def _with_checkpoint(net: nn.Module, file: Path) -> nn.Module:
    task = nn.Module()  # only for the names that the tensors have in a checkpoint
    task.net = net
    try:
        read_run_checkpoint(file, task)
    except InputError as error:
        raise InputError(str(error).removeprefix("resume: ")) from error
    task.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    return net


def _read_config(folder: Path) -> dict[str, Any]:
    """Read what the network depends on, resolved."""
    file = folder / HYDRA_FOLDER / "config.yaml"
    try:
        loaded = OmegaConf.create(file.read_text(encoding="utf-8"))
        if not isinstance(loaded, DictConfig):
            raise TypeError("no mapping")
        config = {
            group: OmegaConf.to_container(loaded[group], resolve=True)
            for group in ("backbone", "compression", "data")
        }
        return {**config, "seed": int(loaded["seed"])}
    except (OSError, ValueError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split()) if file.is_file() else "it is missing"
        raise InputError(f"{folder} is no run folder, {file} cannot be read: {reason}") from error
