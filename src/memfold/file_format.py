"""The bytes of an artifact's file: a header in safetensors format, and tensors after it.

A header that names each of the hundred small tensors of a small network can be as large as its
values: those are bytes in one tensor, and the record that says what is where is compressed. The
size of the file follows from the record and from the shapes and dtypes of the tensors, so that it
is known before they have values.
"""

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from memfold.files import parse_json

__all__ = [
    "CHECKSUM",
    "RECORD",
    "VERSION",
    "WITHOUT_CHECKSUM",
    "WITHOUT_PACKING",
    "WITH_CHECKSUM_INSIDE",
    "check_text",
    "checksum",
    "file_bytes",
    "header",
    "pack",
    "shapes_of",
    "unpack",
]

RECORD = "memfold"
"""Key of the metadata."""
CHECKSUM = "checksum"
VERSION = 5
WITH_CHECKSUM_INSIDE = 4
"""Of the compressed text, whose length then depends on it."""
WITHOUT_PACKING = 3
WITHOUT_CHECKSUM = 2
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
_CODES = {
    torch.complex64: "C64",
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
}
"""Names of dtypes in safetensors format."""
_ALIGNED = 8  # bytes


def pack(
    contents: Mapping[str, Any], tensors: Mapping[str, Tensor], check: int
) -> tuple[str, dict[str, Tensor]]:
    """Turn a record and tensors on the CPU into the text and the tensors of a file.

    Args:
        contents: The record.
        tensors: By name.
        check: Their checksum. It stands beside the compressed text, whose length it would change.

    Returns:
        The text, and the tensors as they follow each other: none starts between its own steps.
    """
    text, small = _describe(contents, tensors, check)
    parts = [tensors[name].reshape(-1).view(torch.uint8) for name in small]
    return text, _arrange(tensors, small, torch.cat(parts) if parts else None)


def unpack(text: str, stored: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Turn the text and the tensors of a file back, those of versions without packing too.

    Raises:
        ValueError: They do not fit; as do zlib.error, KeyError and TypeError.
    """
    version, _, compressed = text.partition(":")
    if version not in (str(VERSION), str(WITH_CHECKSUM_INSIDE)):
        return parse_json(text), dict(stored)
    check, _, compressed = compressed.rpartition(":")
    inflating = zlib.decompressobj()
    record = inflating.decompress(base64.b85decode(compressed), _LONGEST_RECORD)
    if not inflating.eof or inflating.unused_data:
        raise ValueError("the record is cut off or too long")
    contents: Any = parse_json(record.decode())
    if not isinstance(contents, dict):
        raise TypeError("the record is no mapping")
    if version == str(VERSION):
        contents[CHECKSUM] = int(check, 16)
    tensors, packed = dict(stored), dict(contents.pop(_PACKED))
    small = tensors.pop(_SMALL_TENSORS) if packed else torch.zeros(0, dtype=torch.uint8)
    if small.dtype != torch.uint8 or small.dim() != 1:
        raise TypeError(f"{_SMALL_TENSORS} are no bytes")
    start = 0
    for dtype_name, named in packed.items():
        dtype = _DTYPES[dtype_name]
        for name, shape in shapes_of(named).items():
            stop = start + prod(shape) * dtype.itemsize
            if name in tensors or stop > len(small):
                raise ValueError(f"{name} comes twice or is cut off")
            # Values of their own, which start where any dtype may.
            tensors[name] = small[start:stop].clone().view(dtype).reshape(shape)
            start = stop
    if start != len(small):
        raise ValueError(f"{_SMALL_TENSORS} are more than the record says")
    return contents, tensors


def header(text: str, stored: Mapping[str, Tensor]) -> bytes:
    """Return what comes before the tensors of a file, which `pack` has put in order.

    Raises:
        KeyError: The format has no place for a tensor of that dtype.
    """
    entries: dict[str, Any] = {"__metadata__": {RECORD: text}}
    start = 0
    for name, tensor in stored.items():
        places = [start, start + tensor.nbytes]
        code = _CODES[tensor.dtype]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": places}
        start = places[1]
    described = json.dumps(entries, separators=(",", ":")).encode()
    described += b" " * (-len(described) % _ALIGNED)
    return len(described).to_bytes(_ALIGNED, "little") + described


def file_bytes(contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the file of a record and tensors, which may be on the meta device."""
    text, small = _describe(contents, tensors, 0)
    # Calculating with tensors on the meta device would import seconds of PyTorch.
    num_bytes = sum(tensors[name].nbytes for name in small)
    joined = torch.empty(num_bytes, dtype=torch.uint8, device="meta") if small else None
    stored = _arrange(tensors, small, joined)
    return len(header(text, stored)) + sum(tensor.nbytes for tensor in stored.values())


def checksum(contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the record's other entries, and of every tensor in alphabetical order."""
    value = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        value = zlib.crc32(kind.encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def shapes_of(named: Any) -> dict[str, list[int]]:
    """Read pairs of names and shapes, or a mapping.

    Raises:
        ValueError: They are no such thing.
    """
    shapes = {check_text(name): list(shape) for name, shape in dict(named).items()}
    if len(shapes) != len(named):
        raise ValueError("a name comes twice")
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise ValueError("a shape is not made of whole numbers")
    return shapes


def check_text(name: Any) -> str:
    """Check a name, which has to fit the line of a message.

    Raises:
        ValueError: It is no text, or does not.
    """
    if not (isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME):
        raise ValueError(f"a name is no printable text of at most {_LONGEST_NAME} characters")
    return name


def _describe(
    contents: Mapping[str, Any], tensors: Mapping[str, Tensor], check: int
) -> tuple[str, list[str]]:
    """Return the text, and the names of the tensors that are bytes in one, in their order there."""
    packed: dict[str, list[tuple[str, list[int]]]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes < _SMALL and tensor.dtype in _DTYPES.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            packed.setdefault(dtype, []).append((name, list(tensor.shape)))
    record = json.dumps({**contents, _PACKED: packed}, separators=(",", ":"))
    compressed = base64.b85encode(zlib.compress(record.encode(), 9)).decode()
    small = [name for named in packed.values() for name, _ in named]
    return f"{VERSION}:{check:08x}:{compressed}", small


def _arrange(
    tensors: Mapping[str, Tensor], small: Collection[str], joined: Tensor | None
) -> dict[str, Tensor]:
    """Put the small tensors' bytes in their place, and all tensors in order."""
    small = set(small)
    stored = {name: tensor for name, tensor in tensors.items() if name not in small}
    if joined is not None:
        if _SMALL_TENSORS in stored:
            raise ValueError(f"{_SMALL_TENSORS} is a name of the format's")
        stored[_SMALL_TENSORS] = joined
    return dict(sorted(stored.items(), key=lambda item: (-item[1].itemsize, item[0])))
