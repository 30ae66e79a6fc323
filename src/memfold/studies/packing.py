"""The artifacts of completed runs in fewer bits: how small they get, and what that costs."""

import json
import math
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import memfold
from memfold.data.data_module import DataModule
from memfold.errors import InputError
from memfold.files import make_folder, write_text_atomically
from memfold.runs.folder import ARTIFACT, PACKED, RESULT, is_completed, read_result
from memfold.studies.process import Stopped
from memfold.tasks.evaluation import evaluate
from memfold.training.load import fresh_network, load_model, read_data, read_task

__all__ = ["pack_runs"]


def pack_runs(
    runs: Path,
    bits: Sequence[int],
    stop: threading.Event | None = None,
    *,
    allow: Collection[str] = (),
) -> int:
    """Pack all completed runs in the folder `runs`, and evaluate what was packed.

    Runs whose training knew the bits of the artifact (`artifact.train_bits`) have that artifact.

    `packed/<bits>/result.json` is the run's result with the bytes of the packed file and the
    metrics of its contents as `packed/val/...` and `packed/test/...`. What is packed already
    stays.

    Args:
        runs: Holds run folders.
        bits: Per stored value: 16, or 8 to 3.
        stop: Set when the work shall end.
        allow: Classes that are not memfold's; see `load_model`.

    Returns:
        The number of packed files that are new.

    Raises:
        InputError: A run cannot be read, or a file cannot be written.
        Stopped: `stop` was set.
    """
    last: dict[str, DataModule] = {}
    num_packed = 0
    for run in sorted(file.parent for file in runs.glob(f"*/{RESULT}")):
        if not is_completed(run):
            continue
        for number in bits:
            if stop is not None and stop.is_set():
                raise Stopped
            if not _is_packed(run, number) and not _knows_its_bits(run):
                _pack(run, number, last, allow)
                num_packed += 1
    return num_packed


def _is_packed(run: Path, bits: int) -> bool:
    """Tell whether the packed file is that of the run as it is, which may have trained further."""
    packed, result = read_result(run / PACKED / str(bits)), read_result(run)
    return all(packed.get(key) == result.get(key) for key in ("status", "training"))


def _knows_its_bits(run: Path) -> bool:
    compression = read_result(run).get("compression")
    return isinstance(compression, dict) and compression.get("train_bits") is not None


def _pack(run: Path, bits: int, last: dict[str, DataModule], allow: Collection[str]) -> None:
    result: dict[str, Any] = read_result(run)
    for key in ("compression", "metrics", "memory"):
        if not isinstance(result.get(key), dict):
            raise InputError(f"{run / RESULT} is damaged: it has no {key}")
    if result["compression"]["bits"] != 32:
        raise InputError(f"{run} was trained for artifact.bits={result['compression']['bits']}")
    target = run / PACKED / str(bits)
    make_folder(target)
    artifact_bytes = memfold.save(load_model(run, allow=allow), target / ARTIFACT, bits=bits)
    net = memfold.load(target / ARTIFACT, fresh_network(run, allow=allow)).eval()
    counts = memfold.footprint(net)
    memory = {
        **result["memory"],
        "value_bytes": counts.value_bytes,
        "index_bytes": counts.index_bytes,
        "stored_bytes": counts.stored_bytes,
        "stored_ratio": counts.stored_ratio,
        "artifact_bytes": artifact_bytes,
    }
    data = _data_of(run, allow, last)
    found = evaluate(net, read_task(run, data.spec, allow=allow), data)
    # JSON knows no NaN.
    finite = {f"packed/{k}": v if math.isfinite(v) else None for k, v in found.items()}
    metrics = {**result["metrics"], **finite}
    packed = {
        **result,
        "compression": {**result["compression"], "bits": bits},
        "metrics": metrics,
        "memory": memory,
    }
    write_text_atomically(target / RESULT, json.dumps(packed, indent=2) + "\n")


def _data_of(run: Path, allow: Collection[str], last: dict[str, DataModule]) -> DataModule:
    """Return the data of a run, ready to be evaluated on: those in `last`, if they are the same."""
    config, data = read_data(run, allow=allow)
    # The seed is of training.
    key = json.dumps({**config, "seed": None}, sort_keys=True, default=str)
    if key not in last:
        last.clear()  # one comparison has one data set
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        last[key] = data
    return last[key]
