"""Artifacts that somebody has changed on purpose, and given the checksum of what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memfold.file_format import VERSION, WITH_CHECKSUM_INSIDE, checksum, pack, unpack


def forge(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    *,
    signed: bool = True,
) -> None:
    """Write the artifact at `path` again, with other metadata or tensors.

    Args:
        path: Of an artifact.
        change: Changes both in place.
        signed: Whether the file gets the checksum of what it then holds, or none.
    """
    with safe_open(path, framework="pt") as file:
        contents, tensors = unpack(file.metadata()["memfold"], load_file(path))
    del contents["checksum"]
    change(contents, tensors)
    check, version = checksum(contents, tensors), contents["version"]
    if version != VERSION and signed:
        contents["checksum"] = check
    if version in (VERSION, WITH_CHECKSUM_INSIDE):
        text, stored = pack(contents, tensors, check if signed else 0)
        text = text if version == VERSION else f"{version}:{text.rpartition(':')[2]}"
    else:
        text, stored = json.dumps(contents), tensors
    save_file(stored, path, {"memfold": text})
