"""The file of an artifact: tensors, and a record of what they are, in safetensors format.

The format has no code in it, so reading one executes none. A checksum in the record is of
everything else in the file: what was damaged is refused. A header that names each of the hundred
small tensors of a small network can be as large as its values: those are bytes in one tensor, and
the record that says what is where is compressed.
"""

import base64
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memfold.compression.strategy import Strategy
from memfold.errors import InputError
from memfold.files import open_regular, parse_json

__all__ = ["Record", "checksum", "pack", "read", "unpack", "write"]

_KEY = "memfold"
_CHECKSUM = "checksum"
_VERSION = 4
_WITHOUT_PACKING = 3
_WITHOUT_CHECKSUM = 2
"""Versions that are still read; the second knows neither checksum nor ties."""
_LONGEST_NAME = 1000
_LONGEST_RECORD = 100_000_000  # characters; what safetensors allows a header
_SMALL = 16_384
"""Bytes: a larger tensor stands in the file under its own name, for 0.4 % or less."""
_SMALL_TENSORS = "memfold.small_tensors"
_PACKED = "packed"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Record:
    """What an artifact says about its tensors."""

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
    ties: dict[str, str] | None
    """In the backbone: see `accounting.ties_of`; `None` where the file does not say."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "strategy": self.strategy.to_dict(),
            "num_values": self.num_values,
            "weights": list(self.weights.items()),
            "values": list(self.values.items()),
            "indices": sorted(self.indices),
            "reshaped": self.reshaped,
            "ties": self.ties,
        }


def write(path: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Write a file; one that was there is replaced once the new one is complete.

    Raises:
        InputError: The format has no place for a tensor of this kind, or for its name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # safetensors makes files that only their owner can read; this one gets the usual mode.
        partial.touch()
        mode = partial.stat().st_mode
        _check_names(tensors)
        stored = {name: _alone(tensor) for name, tensor in tensors.items()}
        # Lists, as JSON will give them back.
        contents = json.loads(json.dumps({"version": _VERSION, **record.to_dict()}))
        contents[_CHECKSUM] = checksum(contents, stored)
        # One key: safetensors writes several in an order that differs from run to run.
        text, stored = pack(contents, stored)
        save_file(stored, partial, {_KEY: text})
        partial.chmod(mode)
        partial.replace(path)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"artifact {path}: it has no place for a tensor of the model ({error!r})"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """Read a file that somebody else may have written, its tensors by name, on the CPU.

    Raises:
        InputError: It is missing, no regular file, damaged, or not an artifact.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        raise InputError(f"artifact {path} does not exist") from error
    except OSError as error:
        raise InputError(f"artifact {path} cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever safetensors and PyTorch make of a damaged header
        raise InputError(
            f"artifact {path} cannot be read: it is truncated, damaged or not in safetensors "
            f"format ({str(error)[:100]!r})"
        ) from error
    if _KEY not in metadata:
        raise InputError(f"{path} is not a memfold artifact: its metadata has no key {_KEY!r}")
    try:
        contents, tensors = unpack(metadata[_KEY], tensors)
        _check_names(tensors)
        return _record(path, contents, tensors), tensors
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        reason = repr(error)[:100]
        raise InputError(f"artifact {path} has damaged metadata ({reason})") from error


def pack(
    contents: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Turn a record and tensors on the CPU into the text and the tensors of a file."""
    small = {
        name: tensor
        for name, tensor in sorted(tensors.items())
        if tensor.nbytes < _SMALL and tensor.dtype in _DTYPES.values()
    }
    packed: dict[str, list[tuple[str, list[int]]]] = {}
    for name, tensor in small.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        packed.setdefault(dtype, []).append((name, list(tensor.shape)))
    record = json.dumps({**contents, _PACKED: packed}, separators=(",", ":"))
    text = f"{_VERSION}:{base64.b85encode(zlib.compress(record.encode(), 9)).decode()}"
    stored = {name: tensor for name, tensor in tensors.items() if name not in small}
    if small:
        if _SMALL_TENSORS in stored:
            raise ValueError(f"{_SMALL_TENSORS} is a name of the format's")
        in_order = [small[name] for named in packed.values() for name, _ in named]
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in in_order]
        stored[_SMALL_TENSORS] = torch.cat(parts)
    return text, stored


def unpack(text: str, stored: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Turn the text and the tensors of a file back, those of versions without packing too.

    Raises:
        ValueError: They do not fit; as do zlib.error, KeyError and TypeError.
    """
    version, _, compressed = text.partition(":")
    if version != str(_VERSION):
        return parse_json(text), dict(stored)
    inflating = zlib.decompressobj()
    record = inflating.decompress(base64.b85decode(compressed), _LONGEST_RECORD)
    if not inflating.eof or inflating.unused_data:
        raise ValueError("the record is cut off or too long")
    contents: Any = parse_json(record.decode())
    if not isinstance(contents, dict):
        raise TypeError("the record is no mapping")
    tensors, packed = dict(stored), dict(contents.pop(_PACKED))
    small = tensors.pop(_SMALL_TENSORS) if packed else torch.zeros(0, dtype=torch.uint8)
    if small.dtype != torch.uint8 or small.dim() != 1:
        raise TypeError(f"{_SMALL_TENSORS} are no bytes")
    start = 0
    for dtype_name, named in packed.items():
        dtype = _DTYPES[dtype_name]
        for name, shape in _shapes(named).items():
            stop = start + prod(shape) * dtype.itemsize
            if name in tensors or stop > len(small):
                raise ValueError(f"{name} comes twice or is cut off")
            # Values of their own, which start where any dtype may.
            tensors[name] = small[start:stop].clone().view(dtype).reshape(shape)
            start = stop
    if start != len(small):
        raise ValueError(f"{_SMALL_TENSORS} are more than the record says")
    return contents, tensors


def _record(path: Path, contents: Any, tensors: Mapping[str, Tensor]) -> Record:
    version = contents["version"]
    known = (_WITHOUT_CHECKSUM, _WITHOUT_PACKING, _VERSION)
    if type(version) is not int or version not in known:
        raise InputError(
            f"artifact {path} has version {str(version)[:20]!r}, expected one of {known}"
        )
    is_old = version == _WITHOUT_CHECKSUM and _CHECKSUM not in contents
    if not is_old and contents.pop(_CHECKSUM) != checksum(contents, tensors):
        raise InputError(
            f"artifact {path} is damaged: its checksum is of other contents; save it again"
        )
    try:
        strategy = Strategy.from_dict(contents["strategy"])
    except InputError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"artifact {path}: {reason}") from error
    num_values, reshaped = contents["num_values"], _shapes(contents["reshaped"])
    if type(num_values) is not int or num_values < 0:
        raise ValueError("num_values")
    if reshaped and not strategy.changes_shapes:
        raise ValueError("reshaped")
    return Record(
        strategy,
        num_values,
        _shapes(contents["weights"]),
        _shapes(contents["values"]),
        frozenset(_text(name) for name in contents["indices"]),
        reshaped,
        None if is_old else {_text(k): _text(v) for k, v in dict(contents["ties"]).items()},
    )


def _shapes(named: Any) -> dict[str, list[int]]:
    """Read pairs of names and shapes, or a mapping."""
    shapes = {_text(name): list(shape) for name, shape in dict(named).items()}
    if len(shapes) != len(named):
        raise ValueError("a name comes twice")
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise ValueError("a shape is not made of whole numbers")
    return shapes


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    """Refuse names that could not stand in the line of a message."""
    for name in tensors:
        _text(name)


def _text(name: Any) -> str:
    if not (isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME):
        raise ValueError(f"a name is no printable text of at most {_LONGEST_NAME} characters")
    return name


def checksum(contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the record's other entries, and of every tensor in alphabetical order."""
    value = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        value = zlib.crc32(kind.encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor in main memory that no other one uses."""
    tensor = tensor.detach().cpu().contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if is_alone else tensor.clone()
