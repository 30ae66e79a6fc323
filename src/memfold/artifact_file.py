"""Write and read the file of an artifact: tensors, and a record of what they are.

The format has no code in it, so reading one executes none. A checksum is of everything else in the
file: what was damaged is refused.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from memfold.compression.record import Record
from memfold.compression.strategy import Strategy
from memfold.errors import InputError
from memfold.file_format import (
    CHECKSUM,
    RECORD,
    VERSION,
    WITH_CHECKSUM_INSIDE,
    WITHOUT_CHECKSUM,
    WITHOUT_PACKING,
    check_text,
    checksum,
    header,
    pack,
    shapes_of,
    unpack,
)
from memfold.files import open_regular

__all__ = ["read", "write"]


def write(path: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Write a file; one that was there is replaced once the new one is complete.

    Raises:
        InputError: The format has no place for a tensor of this kind, or for its name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _check_names(tensors)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Lists, as JSON will give them back.
        contents = json.loads(json.dumps(record.to_dict()))
        text, stored = pack(contents, stored, checksum(contents, stored))
        with open(partial, "wb") as file:
            file.write(header(text, stored))
            for tensor in stored.values():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
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
    if RECORD not in metadata:
        raise InputError(f"{path} is not a memfold artifact: its metadata has no key {RECORD!r}")
    try:
        contents, tensors = unpack(metadata[RECORD], tensors)
        _check_names(tensors)
        return _record(path, contents, tensors), tensors
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        reason = repr(error)[:100]
        raise InputError(f"artifact {path} has damaged metadata ({reason})") from error


def _record(path: Path, contents: Any, tensors: Mapping[str, Tensor]) -> Record:
    version = contents["version"]
    known = (WITHOUT_CHECKSUM, WITHOUT_PACKING, WITH_CHECKSUM_INSIDE, VERSION)
    if type(version) is not int or version not in known:
        raise InputError(
            f"artifact {path} has version {str(version)[:20]!r}, expected one of {known}"
        )
    is_old = version == WITHOUT_CHECKSUM and CHECKSUM not in contents
    if not is_old and contents.pop(CHECKSUM) != checksum(contents, tensors):
        raise InputError(
            f"artifact {path} is damaged: its checksum is of other contents; save it again"
        )
    try:
        strategy = Strategy.from_dict(contents["strategy"])
    except InputError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"artifact {path}: {reason}") from error
    num_values, merged = contents["num_values"], contents.get("merged")
    reshaped = shapes_of(contents["reshaped"])
    if type(num_values) is not int or num_values < 0:
        raise ValueError("num_values")
    if not (merged is None or type(merged) is int):
        raise ValueError("merged")
    if reshaped and not strategy.changes_shapes:
        raise ValueError("reshaped")
    return Record(
        strategy,
        num_values,
        shapes_of(contents["weights"]),
        shapes_of(contents["values"]),
        frozenset(check_text(name) for name in contents["indices"]),
        reshaped,
        None
        if is_old
        else {check_text(k): check_text(v) for k, v in dict(contents["ties"]).items()},
        merged,
    )


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        check_text(name)
