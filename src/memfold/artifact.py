"""Artifacts: the file that rebuilds the inference function, in safetensors format.

It holds the stored bytes of the footprint and nothing else, after a header that describes the
tensors and, as metadata, the strategy and the weights that it was made for. The format has no
code in it, so loading one executes none.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.quantisation import SUFFIXES, dequantise, quantise
from memfold.strategies.accounting import state_tensors
from memfold.strategies.base import Strategy
from memfold.strategies.compression import (
    Compression,
    check_not_compressed,
    check_whole,
    compressions_in,
    restore_dense,
)
from memfold.strategies.dense import Dense
from memfold.strategies.materialise import filler

__all__ = ["header_bytes", "load", "save"]

_KEY = "memfold"
_VERSION = 2


def save(model: nn.Module, path: str | os.PathLike[str], *, bits: int | None = None) -> int:
    """Write a model's artifact; an existing file is replaced once the new one is complete.

    The file takes `footprint(model).stored_bytes` plus `header_bytes(path)`.

    Args:
        model: A compressed model; one that no strategy has seen is stored as dense.
        path: Usually ends in `.safetensors`.
        bits: Bits per learned value: 32, 16, 8 or 4, in place of the strategy's own `bits`. The
            untouched tensors keep their dtype.

    Returns:
        Size of the file in bytes.

    Raises:
        InputError: The folder does not exist, the model's state holds something that is not a
            tensor, a layer was replaced after it was compressed, `model` is a part or a wrapper of
            a compressed model, or `bits` is not allowed.
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"artifact {path}: must be a file in a folder that exists")
    compression = _compression(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} in the model's state is no tensor and cannot be stored")
    owned: frozenset[str] = frozenset()
    strategy: Strategy = Dense()
    values, indices, num_values, weights, reshaped = {}, {}, 0, [], {}
    if compression is not None:
        compression.check_places()
        strategy, owned = compression.strategy, compression.owned_names()
        values, indices = compression.value_tensors(), compression.index_tensors()
        num_values = compression.num_values
        shapes = zip(compression.names, compression.shapes, strict=True)
        weights = [[name, list(shape)] for name, shape in shapes]
        reshaped = {name: list(shape) for name, shape in compression.dense_shapes().items()}
    if bits is not None:
        strategy = replace(strategy, bits=bits)
    tensors = indices | state_tensors(model, leave_out=owned)
    for name, value in values.items():
        parts = quantise(value, strategy.bits)
        tensors |= {name + suffix: part for suffix, part in parts.items()}
    record = {
        "version": _VERSION,
        "strategy": strategy.to_dict(),
        "num_values": num_values,
        "weights": weights,
        "values": [[name, list(value.shape)] for name, value in values.items()],
        "indices": list(indices),
        "reshaped": reshaped,
    }
    _write(path, tensors, json.dumps(record))
    return path.stat().st_size


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    form: Literal["compressed", "dense"] = "compressed",
) -> nn.Module:
    """Turn a freshly built dense backbone into the model of an artifact, in place.

    Args:
        path: Written by `save`.
        model: The same backbone, on any device, with any values. Its dtype stays: values stored in
            another one, or in fewer bits, are converted. For an artifact of shared weights, or of
            a model that was never compressed, it may be on the meta device: then it goes to the
            device of its other tensors, to PyTorch's default device where it has none, and the
            weights never exist in dense form.
        form: `compressed` gives the model that was saved; `dense` a plain module with the same
            function, whose weights are built once, for inference at the dense model's speed.

    Returns:
        `model`, with the artifact's values.

    Raises:
        InputError: The file is missing, damaged, not an artifact, or made for another backbone;
            `form` is another word; a tensor on the meta device is not in the artifact. The model
            is then unchanged.
    """
    path = Path(path)
    if form not in ("compressed", "dense"):
        raise InputError(f"form must be compressed or dense, got {form!r}")
    check_not_compressed(model)
    record, tensors = _read(path)
    tensors = _unpack(path, record, tensors)
    _check_backbone(path, model, record, tensors)
    fill = filler(model, [*tensors, *record.weights])
    owned: frozenset[str] = frozenset()
    if record.weights:
        names = list(record.weights)
        compression = record.strategy.restore(model, names, record.num_values, tensors)
        owned = compression.owned_names()
    fill(tensors)
    for name, target in state_tensors(model, leave_out=owned).items():
        with torch.no_grad():
            target.copy_(tensors[name])
    if form == "dense":
        restore_dense(model)
    return model


def header_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of an artifact describe it: an 8-byte length and the JSON header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@dataclass(frozen=True)
class _Record:
    """What an artifact's metadata says."""

    strategy: Strategy
    num_values: int
    weights: dict[str, list[int]]
    """Name -> shape of each compressed weight."""
    values: dict[str, list[int]]
    """Name -> shape of each tensor of learned values that stands for them."""
    indices: frozenset[str]
    """Names of the other tensors that do."""
    reshaped: dict[str, list[int]]
    """Name -> shape in the backbone of each untouched tensor that is stored with another."""


def _read(path: Path) -> tuple[_Record, dict[str, Tensor]]:
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
        num_values, weights = record["num_values"], _shapes(record["weights"])
        if type(num_values) is not int or num_values < 0:
            raise ValueError("num_values")
        strategy = Strategy.from_dict(record["strategy"])
        values, indices = _shapes(record["values"]), frozenset(record["indices"])
        reshaped = _shapes(record["reshaped"])
        if reshaped and not strategy.changes_shapes:
            raise ValueError("reshaped")
        return _Record(strategy, num_values, weights, values, indices, reshaped), tensors
    except InputError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"artifact {path} has damaged metadata ({error!r})") from error


def _shapes(named: Any) -> dict[str, list[int]]:
    """Read pairs of names and shapes, or a mapping."""
    shapes = {str(name): list(shape) for name, shape in dict(named).items()}
    if len(shapes) != len(named):
        raise ValueError("a name comes twice")
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise ValueError("a shape is not made of whole numbers")
    return shapes


def _unpack(path: Path, record: _Record, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn packed values back into floating-point tensors of their shapes."""
    unpacked = dict(tensors)
    for name, shape in record.values.items():
        parts = {
            suffix: unpacked.pop(name + suffix) for suffix in SUFFIXES if name + suffix in tensors
        }
        bits = record.strategy.bits
        dtype = parts[""].dtype if bits == 32 and "" in parts else torch.float32
        try:
            unpacked[name] = dequantise(parts, shape, bits, dtype)
        except InputError as error:
            raise InputError(f"artifact {path}: {name}: {error}") from error
    return unpacked


def _check_backbone(
    path: Path, model: nn.Module, record: _Record, tensors: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes with the dense backbone before it is touched."""
    stored = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stored |= record.weights | record.reshaped
    for name, target in state_tensors(model).items():
        if name not in tensors and name not in record.weights:
            raise InputError(f"artifact {path} is of another backbone: it has no {name}")
        if stored[name] != list(target.shape):
            raise InputError(
                f"artifact {path} is of another backbone: its {name} has shape {stored[name]}, "
                f"this one's has {list(target.shape)}"
            )
    known = model.state_dict(keep_vars=True)
    for name in record.weights:
        if name not in known:
            raise InputError(f"artifact {path} is of another backbone: this one has no {name}")
    for name in tensors:
        if name not in known and name not in record.values and name not in record.indices:
            raise InputError(f"artifact {path} is of another backbone: this one has no {name}")


def _compression(model: nn.Module) -> Compression | None:
    """Return the compression of a model; refuse parts of one, and what holds one."""
    check_whole(model)
    found = dict(compressions_in(model))
    for prefix in filter(None, found):
        part = prefix.removesuffix(".")
        raise InputError(f"the compressed model is the part {part!r}: save that part")
    return found.get("")


def _write(path: Path, tensors: Mapping[str, Tensor], record: str) -> None:
    """Write a file once it is complete."""
    # One key: safetensors writes several in an order that differs from run to run.
    metadata = {_KEY: record}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # safetensors makes files that only their owner can read; this one gets the usual mode.
        partial.touch()
        mode = partial.stat().st_mode
        save_file({k: _alone(v) for k, v in tensors.items()}, partial, metadata)
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory no other one uses."""
    tensor = tensor.detach().contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if is_alone else tensor.clone()
