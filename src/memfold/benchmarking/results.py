"""From measurements to `results.json`: medians over rounds, and ratios to dense.

    {"status", "command", "started", "rounds", "environment",
     "cases": [{"name", "variant", "group", "case", "status", "error",
                "measured": {metric: {"median", "min", "max"}},
                "relative": {metric: {"median", "min", "max"}},
                "rounds": [{metric: number, ..., "steps": [seconds, ...]}]}]}

`measured` and `relative` are taken over the rounds; a ratio is that of a case to the dense case of
its group in the same round. They are empty for a case that failed, and `relative` where its dense
case did.
"""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch

from memfold.benchmarking.case_process import Measurement
from memfold.benchmarking.cases import Case
from memfold.errors import InputError
from memfold.files import read_json
from memfold.runs.result import describe_environment

__all__ = ["Entry", "by_group", "describe_machine", "read_results", "summarise"]

Entry = dict[str, Any]
"""One of the "cases" of a results.json."""

# A densified model is another one than the case's, but has the same dense model to be compared to.
_DENSE_METRIC = {
    "densified_latency_1_seconds": "latency_1_seconds",
    "densified_latency_batch_seconds": "latency_batch_seconds",
}


def summarise(
    case: Case, measurements: Sequence[Measurement], dense: Sequence[Measurement]
) -> Entry:
    """Put together what all rounds say about a case.

    Args:
        case: What was measured.
        measurements: One a round.
        dense: Those of its dense case, in the same rounds.
    """
    errors = [found["error"] for found in [*measurements, {}] if "error" in found]
    entry: Entry = {
        "name": case.name,
        "variant": case.variant,
        "group": case.group,
        "case": case.to_dict(),
        "status": "failed" if errors else "completed",
        "error": errors[0] if errors else None,
        "measured": {},
        "relative": {},
        "rounds": [found for found in measurements if "error" not in found],
    }
    if errors:
        return entry
    metrics = [key for key in measurements[0] if key != "steps"]
    entry["measured"] = {key: _spread(found[key] for found in measurements) for key in metrics}
    if not any("error" in found for found in dense):
        for key in metrics:
            base = _DENSE_METRIC.get(key, key)
            if base not in dense[0]:
                continue
            pairs = [(a[key], b[base]) for a, b in zip(measurements, dense, strict=True)]
            if all(below > 0 for _, below in pairs):
                entry["relative"][key] = _spread(above / below for above, below in pairs)
    return entry


def describe_machine(device: str, threads: int) -> dict[str, object]:
    """Describe hardware and versions; `None` where something cannot be known."""
    cuda = torch.device(device).type == "cuda"
    return {
        "cpu": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "os": platform.platform(),
        **describe_environment(),
    }


def by_group(results: dict[str, Any]) -> list[tuple[str, list[Entry]]]:
    """List the groups of a results.json with their cases, the dense one first."""
    groups = groupby(results["cases"], key=lambda entry: entry["group"])
    return [(name, list(entries)) for name, entries in groups]


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a results.json ({error})") from error
    if not isinstance(results, dict) or not isinstance(results.get("cases"), list):
        raise InputError(f"{path}: is no results.json of the benchmark")
    return results


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
