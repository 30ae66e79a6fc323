"""Read what W&B has written offline, without a server: what a user would see after `wandb sync`.

The file is a log of protobuf records, cut into blocks as LevelDB does.
"""

import json
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

_HEADER_SIZE, _BLOCK_SIZE = 7, 32768
_FULL, _LAST = 1, 4  # kinds of pieces that complete a record


@dataclass
class OfflineRun:
    """One `offline-run-*` folder."""

    folder: Path
    run: Any = None
    """Name, group, job type, tags, sweep, git."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    """Metric, or pattern of metrics -> what is its x axis."""
    exit_code: int | None = None

    def file(self, name: str) -> Path:
        """What is uploaded as `name`."""
        return self.folder / "files" / name


def offline_runs(run_folder: Path) -> list[OfflineRun]:
    """Read all that the run in this folder has written, in the order of its starts."""
    return [_read_ended(folder) for folder in sorted(run_folder.glob("wandb/offline-run-*"))]


def _read_ended(folder: Path) -> OfflineRun:
    """Wait for W&B's own process, which may write the end after `finish` has returned."""
    deadline = time.monotonic() + 60
    while (found := _read(folder)).exit_code is None:
        assert time.monotonic() < deadline, f"{folder} has no end"
        time.sleep(0.1)
    return found


def _read(folder: Path) -> OfflineRun:
    found = OfflineRun(folder)
    [path] = folder.glob("run-*.wandb")
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _values(record.run.config.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[Any]:
    assert data[:4] in (b":W&B", b"")
    position, record = _HEADER_SIZE, b""
    while position + _HEADER_SIZE <= len(data):
        left = _BLOCK_SIZE - position % _BLOCK_SIZE
        if left < _HEADER_SIZE:  # too little for a piece: filled with zeros
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEADER_SIZE
        if position + length > len(data):  # the rest is not written yet
            return
        record += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield messages.Record.FromString(record)
            record = b""
