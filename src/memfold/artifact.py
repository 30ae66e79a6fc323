"""Artifacts: the file that rebuilds the inference function, in safetensors format.

It holds the stored bytes of the footprint and nothing else, after a header that describes the
tensors and, as metadata, the strategy and the weights that it was made for. The format has no
code in it, so loading one executes none.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.strategies.accounting import state_tensors
from memfold.strategies.base import Strategy, compression_of
from memfold.strategies.dense import Dense

__all__ = ["header_bytes", "load", "save"]

_KEY = "memfold"
_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a model's artifact; an existing file is replaced once the new one is complete.

    The file takes `footprint(model).stored_bytes` plus `header_bytes(path)`.

    Args:
        model: A compressed model; one that no strategy has seen is stored as dense.
        path: Usually ends in `.safetensors`.

    Returns:
        Size of the file in bytes.

    Raises:
        InputError: The model's state holds something that is not a tensor.
    """
    path = Path(path)
    compression = compression_of(model)
    if compression is None:
        strategy: Strategy = Dense()
        tensors, num_values, names, shapes = {}, 0, [], []
    else:
        strategy, tensors = compression.strategy, compression.packed()
        num_values, names, shapes = compression.num_values, compression.names, compression.shapes
    owned = compression.owned_names() if compression is not None else frozenset()
    tensors |= state_tensors(model, leave_out=owned)
    record = {
        "version": _VERSION,
        "strategy": strategy.to_dict(),
        "num_values": num_values,
        "weights": [[n, list(s)] for n, s in zip(names, shapes, strict=True)],
    }
    # One key: safetensors writes several in an order that differs from run to run.
    metadata = {_KEY: json.dumps(record)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Turn a freshly built dense backbone into the model of an artifact, in place.

    Args:
        path: Written by `save`.
        model: The same backbone, on any device, with any values. Its dtype stays: values stored in
            another one are converted.

    Returns:
        `model`, compressed, with the artifact's values.

    Raises:
        InputError: The file is missing, damaged, not an artifact, or made for another backbone.
            The model is then unchanged.
    """
    path = Path(path)
    strategy, num_values, weights, tensors = _read(path)
    _check_backbone(path, model, weights, tensors)
    owned: frozenset[str] = frozenset()
    if weights:
        compression = strategy.restore(model, num_values)
        compression.unpack(tensors)
        owned = compression.owned_names()
    for name, target in state_tensors(model, leave_out=owned).items():
        with torch.no_grad():
            target.copy_(tensors[name])
    return model


def header_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of an artifact describe it: an 8-byte length and the JSON header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read(path: Path) -> tuple[Strategy, int, dict[str, list[int]], dict[str, Tensor]]:
    """Read strategy, number of values, shapes of the compressed weights, and all tensors."""
    if not path.is_file():
        raise InputError(f"artifact {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"artifact {path} cannot be read: it is truncated, damaged or not in safetensors "
            f"format ({error})"
        ) from error
    if _KEY not in metadata:
        raise InputError(f"{path} is not a memfold artifact: its metadata has no key {_KEY!r}")
    try:
        record = json.loads(metadata[_KEY])
        version = record["version"]
        if version != _VERSION:
            raise InputError(f"artifact {path} has version {version!r}, expected {_VERSION}")
        strategy = Strategy.from_dict(record["strategy"])
        return strategy, int(record["num_values"]), dict(record["weights"]), tensors
    except InputError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"artifact {path} has damaged metadata ({error!r})") from error


def _check_backbone(
    path: Path, model: nn.Module, weights: dict[str, list[int]], tensors: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes with the dense backbone before it is touched."""
    stored = {name: list(tensor.shape) for name, tensor in tensors.items()} | weights
    for name, target in state_tensors(model).items():
        if name not in stored:
            raise InputError(f"artifact {path} is of another backbone: it has no {name}")
        if stored[name] != list(target.shape):
            raise InputError(
                f"artifact {path} is of another backbone: its {name} has shape {stored[name]}, "
                f"this one's has {list(target.shape)}"
            )
    for name in weights:
        if name not in model.state_dict(keep_vars=True):
            raise InputError(f"artifact {path} is of another backbone: this one has no {name}")
