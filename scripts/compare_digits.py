#!/usr/bin/env python
"""Every strategy on the embedded digits: 3 seeds at ratios 0.3, 0.1, 0.03 and 0.01.

Runs what is missing under `outputs/digits`, several runs at a time with one thread each, then
writes one row per run to `results/digits.csv` and the tables into `docs/digits.md`. It can be
interrupted and started again at any time: completed runs are kept.
"""

import csv
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memfold.strategies import strategy_class, strategy_names
from memfold.strategies.layers.base import LayerStrategy
from memfold.studies.arguments import add_jobs, command_parser, ending_in_one_line, working_in
from memfold.studies.process import StopSignal
from memfold.studies.runner import Outcome, run_all, runners

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

Job = tuple[str, float, int]
Row = dict[str, Any]


def main() -> int:
    """Run, collect, write."""
    parser = command_parser((__doc__ or "").partition("\n")[0])
    add_jobs(parser)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "digits")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    def body(stop: StopSignal) -> int:
        jobs = list_jobs()
        planned = {name_of(job): overrides(*job) for job in jobs}
        workers = runners(Path(os.path.relpath(ROOT / "train.py")), arguments.jobs, stop)
        with working_in(arguments.runs, stop):
            folder = arguments.runs.resolve()
            outcomes = run_all(planned.items(), folder, workers, report)
        write([row(job, outcomes[name_of(job)]) for job in jobs])
        return 0

    return ending_in_one_line(body)


def list_jobs() -> list[Job]:
    """List (strategy, ratio, seed)."""
    # What repeated layers have in common says little in a network with three of a kind.
    names = [n for n in strategy_names() if not issubclass(strategy_class(n), LayerStrategy)]
    # ltr last: it is many trainings a run, and the others should not wait for it.
    names.sort(key=lambda name: (name == "ltr", name))
    return [(name, ratio, seed) for name in names for ratio in ratios_of(name) for seed in SEEDS]


def ratios_of(strategy: str) -> tuple[float, ...]:
    """Return the ratios at which a strategy is compared."""
    return (1.0,) if strategy_class(strategy).ratios == "one" else RATIOS


def name_of(job: Job) -> str:
    """Name the folder of a run."""
    strategy, ratio, seed = job
    return f"{strategy}-{ratio:g}-s{seed}"


def overrides(strategy: str, ratio: float, seed: int) -> list[str]:
    """Return what `train.py` gets."""
    given = [f"compression={strategy}", f"seed={seed}"]
    given += [] if ratio == 1.0 else [f"ratio={ratio:g}"]
    given += [f"trainer.max_epochs={NUM_EPOCHS}", *OPTIONS.get(strategy, [])]
    return [*given, "logger=csv", "trainer=cpu", "callbacks.progress_bar=null"]


def report(name: str, outcome: Outcome) -> None:
    """Print how a run ended."""
    print(f"{name}: {outcome.error or 'completed'} ({outcome.seconds:.0f} s)", flush=True)


def row(job: Job, outcome: Outcome) -> Row:
    """Return the row of a run."""
    known = dict(zip(("strategy", "ratio", "seed"), job, strict=True))
    if outcome.error:
        return known | {"status": "failed", "error": outcome.error}
    result = outcome.result
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


def write(rows: Sequence[Row]) -> None:
    """Write `results/digits.csv` and the tables of `docs/digits.md`."""
    (ROOT / "results").mkdir(exist_ok=True)
    with (ROOT / "results" / "digits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    page = ROOT / "docs" / "digits.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}", encoding="utf-8")


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
            ratios = ratios_of(name) * (len(RATIOS) // len(ratios_of(name)))
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
    sys.exit(main())
