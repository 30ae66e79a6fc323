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
from memfold.strategies.base import Compression, Strategy, compression_of
from memfold.strategies.dense import Dense

__all__ = ["header_bytes", "load", "save"]

_FORMAT = "memfold"
_VERSION = "1"


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
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "strategy": json.dumps(strategy.to_dict()),
        "num_values": str(num_values),
        "weights": json.dumps([[n, list(s)] for n, s in zip(names, shapes, strict=True)]),
    }
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
        model: The same backbone, on any device, with any values.

    Returns:
        `model`, compressed, with the artifact's values.

    Raises:
        InputError: The file is missing, damaged, not an artifact, or made for another backbone.
            The model is unchanged unless a tensor turns out to be of another shape.
    """
    metadata, tensors = _read(Path(path))
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise InputError(
            f"{path} is not a memfold artifact of version {_VERSION}: its metadata says "
            f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        )
    strategy = Strategy.from_dict(json.loads(metadata["strategy"]))
    weights = json.loads(metadata["weights"])
    if not weights:
        _fill(model, tensors, frozenset(), path)
        return model
    _check_weights(path, model, weights)
    compression = strategy.restore(model, int(metadata["num_values"]))
    _check_structure(path, compression, weights)
    compression.unpack(tensors)
    _fill(model, tensors, compression.owned_names(), path)
    return model


def header_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of an artifact describe it: an 8-byte length and the JSON header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"artifact {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"artifact {path} cannot be read: it is truncated, damaged or not in safetensors "
            f"format ({error})"
        ) from error


def _check_weights(path: str | os.PathLike[str], model: nn.Module, weights: list[list]) -> None:
    """Compare names and shapes with the dense backbone before it is touched."""
    state = model.state_dict(keep_vars=True)
    for name, shape in weights:
        if name not in state:
            raise InputError(f"artifact {path} is of another backbone: this one has no {name}")
        if list(state[name].shape) != shape:
            raise InputError(
                f"artifact {path} is of another backbone: its {name} has shape {shape}, this one's "
                f"has {list(state[name].shape)}"
            )


def _check_structure(
    path: str | os.PathLike[str], compression: Compression, weights: list[list]
) -> None:
    found = [[n, list(s)] for n, s in zip(compression.names, compression.shapes, strict=True)]
    if found != weights:
        raise InputError(
            f"artifact {path} is of another backbone: it has {len(weights)} compressed tensors, "
            f"this one {len(found)}, or in another order"
        )


def _fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    owned: frozenset[str],
    path: str | os.PathLike[str],
) -> None:
    """Copy the untouched tensors; a tied one is stored under its first name."""
    for name, target in state_tensors(model, leave_out=owned).items():
        if name not in tensors or tensors[name].shape != target.shape:
            raise InputError(
                f"artifact {path} is of another backbone: it has no {name} of shape "
                f"{tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensors[name])
