"""The network of a run, from its folder alone: no Hydra, no Trainer, no pickle."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.compression.parts import MARKS, ComputedWeights
from memfold.data.data_module import DataModule
from memfold.data.spec import DataSpec
from memfold.errors import InputError
from memfold.runs.folder import ARTIFACT, LAST_CHECKPOINT
from memfold.runs.recorded import read_config
from memfold.tasks import Task
from memfold.training.checkpoint_reading import StartingPoint, read_checkpoint
from memfold.training.foreign_code import refuse_foreign_code
from memfold.training.instantiate import instantiate
from memfold.training.networks import build_backbone, build_network, build_task

__all__ = ["fresh_network", "load_model", "read_data", "read_run_checkpoint", "read_task"]

_FILES = {
    "artifact": Path(ARTIFACT),
    "last": LAST_CHECKPOINT,
    "best": LAST_CHECKPOINT.with_name("best.ckpt"),
}


def load_model(
    run_dir: str | os.PathLike[str],
    weights: Literal["artifact", "last", "best"] = "artifact",
    *,
    allow: Collection[str] = (),
) -> nn.Module:
    """Build the network of a run as its saved configuration says, with the weights it has left.

    The folder may be somebody else's: of its configuration nothing runs but classes of memfold.

    Args:
        run_dir: A run folder.
        weights: `artifact` is what the completed run saved; `last` and `best` are checkpoints,
            which an interrupted run has too. To rebuild from a checkpoint a network whose strategy
            looks at data, the data set is read.
        allow: Dotted paths of further classes that the configuration may name, such as the
            `backbone.target` of a custom backbone.

    Returns:
        The compressed network, on the CPU and in evaluation mode. Its inputs are those that the
        run's data module gives.

    Raises:
        InputError: The folder is no run folder, the file is missing or damaged, it is of
            another network than the configuration, or that names code which is not allowed.
    """
    folder = Path(run_dir)
    if weights not in _FILES:
        raise InputError(f"weights must be one of {', '.join(_FILES)}, got {weights!r}")
    config = _read_config(folder, allow)
    file = folder / _FILES[weights]
    if not file.is_file():
        present = [name for name, path in _FILES.items() if (folder / path).is_file()]
        raise InputError(
            f"{folder} has no {_FILES[weights]}; there are weights={' or '.join(present)}"
            if present
            else f"{folder} has no weights: neither {ARTIFACT} nor a checkpoint"
        )
    data = _read_data(folder, config)
    with torch.random.fork_rng():  # initial values are drawn, and replaced
        if weights == "artifact":
            return memfold.load(file, build_backbone(config["backbone"], data.spec)).eval()
        net, *_ = build_network(config, data, build_task(config["task"], data.spec))
    return _with_checkpoint(net, file).eval()


def read_data(
    run_dir: str | os.PathLike[str], *, allow: Collection[str] = ()
) -> tuple[dict[str, Any], DataModule]:
    """Build the data module of a run, and return it after its configuration; see `load_model`.

    Raises:
        InputError: The folder is no run folder, or names code that is not allowed.
    """
    config = _read_config(Path(run_dir), allow)
    return config["data"], _read_data(Path(run_dir), config)


def read_task(
    run_dir: str | os.PathLike[str], spec: DataSpec, *, allow: Collection[str] = ()
) -> Task:
    """Build the task of a run for data like `spec`; see `load_model`.

    Raises:
        InputError: The folder is no run folder, or names code that is not allowed.
    """
    return build_task(_read_config(Path(run_dir), allow)["task"], spec)


def fresh_network(run_dir: str | os.PathLike[str], *, allow: Collection[str] = ()) -> nn.Module:
    """Build the dense backbone of a run with new initial weights; see `load_model`.

    Raises:
        InputError: The folder is no run folder, or names code that is not allowed.
    """
    config = _read_config(Path(run_dir), allow)
    with torch.random.fork_rng():
        return build_backbone(config["backbone"], _read_data(Path(run_dir), config).spec)


def read_run_checkpoint(path: Path, module: nn.Module, *, resumes: bool = False) -> StartingPoint:
    """Check that the checkpoint at `path` is of `module`, which has a `net`: `read_checkpoint`."""
    net = module.net
    assert isinstance(net, nn.Module)
    compression = compression_of(net)
    resizable: set[str] = set()
    if compression is not None and compression.is_resizable:
        resizable = {f"net.{name}" for name in compression.owned_names()}
    optional = {f"net.{MARKS}"}
    if isinstance(compression, ComputedWeights):
        optional |= {f"net.{name}" for name in compression.dense_names()}
    return read_checkpoint(path, module.state_dict(), resizable, optional, resumes=resumes)


def _read_data(folder: Path, config: dict[str, Any]) -> DataModule:
    data: DataModule = instantiate(config["data"], "data", DataModule)
    data.read_facts(folder)
    return data


def _with_checkpoint(net: nn.Module, file: Path) -> nn.Module:
    module = nn.Module()  # only for the names that the tensors have in a checkpoint
    module.net = net
    try:
        read_run_checkpoint(file, module)
    except InputError as error:
        raise InputError(str(error).removeprefix("resume: ")) from error
    module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    return net


def _read_config(folder: Path, allow: Collection[str]) -> dict[str, Any]:
    """Read what the network depends on, resolved."""
    try:
        config = read_config(folder, ("backbone", "compression", "data", "seed", "task"))
    except InputError as error:
        raise InputError(f"{folder} is no run folder, {error}") from error
    try:
        refuse_foreign_code(config, allow, "pass allow=[{!r}]")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    if not isinstance(config["seed"], int):
        raise InputError(f"{folder}: seed must be a whole number, got {config['seed']!r}")
    return config
