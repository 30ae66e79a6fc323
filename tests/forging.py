"""Artifacts that somebody has changed on purpose, and given the checksum of what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memfold.artifact_file import checksum


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
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        contents = json.loads(file.metadata()["memfold"])
    del contents["checksum"]
    change(contents, tensors)
    if signed:
        contents["checksum"] = checksum(contents, tensors)
    save_file(tensors, path, {"memfold": json.dumps(contents)})
