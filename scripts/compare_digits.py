#!/usr/bin/env python
"""Every strategy on the embedded digits: 3 seeds at ratios 0.3, 0.1, 0.03 and 0.01.

Runs what is missing under `outputs/digits`, several runs at a time with one thread each, then
writes one row per run to `results/digits.csv` and the tables into `docs/digits.md`. It can be
interrupted and started again at any time: completed runs are kept.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from memfold.overrides import quote_value
from memfold.strategies import strategy_names

ROOT = Path(__file__).parents[1]
RATIOS = (0.3, 0.1, 0.03, 0.01)
SEEDS = (1, 2, 3)
NUM_EPOCHS = 10
# 200 steps are too few for the published 100 between two updates.
OPTIONS = {"rigl": ["compression.update_every=10"], "set": ["compression.update_every=10"]}
BEGIN, END = "<!-- measured: written by scripts/compare_digits.py -->", "<!-- end of measured -->"
COLUMNS: tuple[str, ...] = (
    "strategy",
    "ratio",
    "seed",
    "status",
    "val_acc",
    "test_acc",
    "stored_bytes",
    "value_bytes",
    "index_bytes",
    "index_format",
    "train_state_bytes",
    "epochs",
    "steps",
    "error",
)

Row = dict[str, Any]


def main() -> None:
    """Run, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "digits")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda job: run(arguments.runs.resolve(), *job), jobs()))
    (ROOT / "results").mkdir(exist_ok=True)
    with (ROOT / "results" / "digits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    page = ROOT / "docs" / "digits.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}", encoding="utf-8")


def jobs() -> list[tuple[str, float, int]]:
    """List (strategy, ratio, seed); the dense model has one ratio."""
    names = [name for name in strategy_names() if name not in ("dense", "ltr")]
    names.append("ltr")  # many trainings a run: the others should not wait for it
    dense = [("dense", 1.0, seed) for seed in SEEDS]
    return dense + [(name, ratio, seed) for name in names for ratio in RATIOS for seed in SEEDS]


def run(runs: Path, strategy: str, ratio: float, seed: int) -> Row:
    """Return the row of a run, after training it unless that was done before."""
    folder = runs / f"{strategy}-{ratio:g}-s{seed}"
    result = read(folder)
    error = ""
    if result.get("status") != "completed":
        command = [sys.executable, "train.py", f"compression={strategy}", f"seed={seed}"]
        command += [] if strategy == "dense" else [f"ratio={ratio:g}"]
        command += [f"trainer.max_epochs={NUM_EPOCHS}", *OPTIONS.get(strategy, [])]
        resume = any((folder / path).exists() for path in ("checkpoints/last.ckpt", "rounds/0"))
        command.append(f"{'resume' if resume else 'hydra.run.dir'}={quote_value(str(folder))}")
        done = subprocess.run(
            [*command, "logger=csv", "trainer=cpu", "callbacks.progress_bar=null"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        result = read(folder)
        error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        print(f"{folder.name}: {result.get('status', 'failed')} {error}", flush=True)
    known = {"strategy": strategy, "ratio": ratio, "seed": seed}
    if result.get("status") != "completed":
        return known | {"status": "failed", "error": result.get("error", error)}
    metrics, memory = result["metrics"], result["memory"]
    return known | {
        "status": "completed",
        "val_acc": round(metrics["val/acc"], 4),
        "test_acc": round(metrics["test/acc"], 4),
        "stored_bytes": memory["stored_bytes"],
        "value_bytes": memory["value_bytes"],
        "index_bytes": memory["index_bytes"],
        "index_format": result["compression"]["index_format"],
        "train_state_bytes": memory["train_state_bytes"],
        "epochs": round(result["training"]["epochs"], 2),
        "steps": result["training"]["steps"],
    }


def read(folder: Path) -> dict[str, Any]:
    """Return a run's `result.json`, empty when there is none."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def tables(rows: Sequence[Row]) -> str:
    """Write accuracy, stored bytes and the length of training as Markdown tables."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["strategy"], row["ratio"]].append(row)
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    head = [f"| ratio | {' | '.join(f'{ratio:g}' for ratio in RATIOS)} |", "|---" * 5 + "|"]
    sections = (
        ("Test accuracy in percent, mean ± standard deviation:", accuracy),
        ("Stored bytes, mean:", lambda done: f"{mean(done, 'stored_bytes'):,.0f}"),
        ("Optimizer steps in all:", lambda done: f"{mean(done, 'steps'):,.0f}"),
    )
    text = []
    for title, cell in sections:
        text += [title, "", *head]
        for name in names:
            ratios = [1.0] * len(RATIOS) if name == "dense" else RATIOS
            cells = [complete(groups[name, ratio], cell) for ratio in ratios]
            text.append(f"| [{name}](strategies/{name}.md) | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text).rstrip()


def complete(rows: Sequence[Row], cell: Any) -> str:
    """Fill a cell from the completed runs; "-" when there is none."""
    done = [row for row in rows if row["status"] == "completed"]
    missing = "" if len(done) == len(rows) else f" ({len(done)} of {len(rows)} runs)"
    return cell(done) + missing if done else "-"


def accuracy(rows: Sequence[Row]) -> str:
    """Mean and sample standard deviation."""
    values = [100 * row["test_acc"] for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of a column."""
    return statistics.mean(row[key] for row in rows)


if __name__ == "__main__":
    main()
