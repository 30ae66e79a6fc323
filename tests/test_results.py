"""Committed results and what is made of them agree."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Comparison
from memfold.reporting.run_lines import to_run_lines
from memfold.reporting.statistics import AXES, points
from memfold.reporting.tables import to_csv, to_markdown

ROOT = Path(__file__).parents[1]
RESULTS = sorted(file.parent for file in (ROOT / "results").glob("*/runs.jsonl"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_report_draws_the_committed_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = (folder / "README.md").read_text(encoding="utf-8")
    runs, problems = read([folder / "runs.jsonl"], is_joined="--join-backbones" in command)
    comparison = Comparison(tuple(runs), tuple(problems))
    committed = (folder / "table.md").read_text(encoding="utf-8")
    title = committed.splitlines()[0].removeprefix("# ")
    assert to_markdown(comparison, title) == committed
    assert to_csv(comparison) == (folder / "table.csv").read_text(encoding="utf-8")
    assert to_run_lines(comparison) == (folder / "runs.jsonl").read_text(encoding="utf-8")


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    """Rows `| method | 90.1 ± 0.2 | ... |` between two marks, a column for each ratio."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((name, table),) = re.findall(r"<!-- results/(\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    (_, *heads), _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    # A row may say after its name what is not the default's own: "roast, with ..."
    rows = [[method.partition(", with ")[0], *cells] for method, *cells in rows]
    runs, _ = read([ROOT / "results" / name / "runs.jsonl"])
    found = {
        (
            point.method,
            point.requested_ratio,
        ): f"{100 * point.y:.1f} ± {100 * (point.y_std or 0):.1f}"
        for point in points([run for run in runs if run.bits == 32], AXES["stored_bytes"])
    }
    assert {method for method, *_ in rows} == {method for method, _ in found}
    for method, *accuracies in rows:
        ratios = [None if method == "dense" else float(head) for head in heads]
        assert accuracies == [found.get((method, ratio), "-") for ratio in ratios]
    assert len(found) == sum(cell != "-" for row in rows[1:] for cell in row[1:]) + 1


_RPS = "stable_rps (gradient_scale={}, share_biases={}, train_bits={})"
_LENET = _RPS.format("length", "false", "null")
_ROWS = {
    "narrow CNN, trained with 4 bits": [["small (train_bits=4), cnn (width=32)"]],
    "`stable_rps` in a CNN": [[f"{_RPS.format('length', 'false', '4')}, cnn (width=16)"]],
    "`stable_rps`, LeNet, trained with 4 bits |": [[_RPS.format("length", "false", "4")]],
    "the same with `share_biases=true`": [[_RPS.format("length", "true", "4")]],
    "the same behind 2x2": [[f"{_RPS.format('length', 'true', '4')}, mlp (pooling=2)"]],
    "`ltr`": [["ltr"]],
    "lottery tickets": [["ltr"]],
    "narrow CNN, 32 bits": [["small (train_bits=null), cnn (width=32)"]],
    "`stable_rps`, projection": [[_RPS.format("projection", "false", "null")]],
    "`stable_rps`, length": [[_LENET]],
    "`roast`": [
        ["roast (gradient_scale=length, initial_scale=null)"],
        ["roast (gradient_scale=none, initial_scale=0.04)"],
    ],
    "`hashednet`": [["hashednet (gradient_scale=length)"], ["hashednet (gradient_scale=none)"]],
    "narrow MLP behind 4x4": [[f"small (train_bits=null), mlp (pooling={n})"] for n in (4, 2)],
    "narrow MLP behind pooling": [[f"small (train_bits=null), mlp (pooling={n})" for n in (2, 4)]],
    "best pruned": [["rand", "mag", "snip", "grasp", "synflow", "set", "rigl"]],
}
"""How rows begin -> for each number in a cell, the methods of which it is the best."""


@pytest.mark.parametrize("page", ["README.md", "results/fashion_mnist_bytes/README.md"])
def test_the_tables_by_bytes_are_those_of_the_results(page: str) -> None:
    """Rows `| method | 90.1 ± 0.2 | - |` below sizes of the file; `-`: it was not run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    ((head, table),) = re.findall(r"^\| (\| [\d,]+ bytes.*) \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", head)]
    runs, _ = read([ROOT / "results" / "fashion_mnist_bytes" / "runs.jsonl"], is_joined=True)
    found = {
        (point.method, point.budget_bytes): point
        for point in points(runs, AXES["stored_bytes"])
        if point.budget_bytes is not None
    }
    rows = table.splitlines()
    for row in rows:
        ((_, numbers),) = ((k, v) for k, v in _ROWS.items() if row.startswith(f"| {k}"))
        for cell, size in zip(row.strip("| ").split(" | ")[1:], sizes, strict=True):
            there = [[found[m, size] for m in ms if (m, size) in found] for ms in numbers]
            best = [max(rivals, key=lambda p: p.y) for rivals in there if rivals]
            expected = [f"{100 * p.y:.1f} ± {100 * (p.y_std or 0):.1f}" for p in best]
            assert re.findall(r"\d+\.\d ± \d+\.\d", cell) == expected
            assert (cell == "-") == (not expected)
    assert len(rows) >= 7


_RESNET20 = {
    "dense": "dense",
    "`stable_rps`, projection": "stable_rps (gradient_scale=projection, train_bits=null)",
    "`stable_rps`, length": "stable_rps (gradient_scale=length, train_bits=null)",
    "`roast`, with the scales of `stable_rps`": "roast",
    "`hashednet`, with these scales": "hashednet",
    "`rand`, ERK densities": "rand (train_bits=null)",
    "`synflow`": "synflow",
    "narrow ResNet-20": "small (train_bits=null)",
}
_IN_4_BITS = {
    "`stable_rps`, length": "stable_rps (gradient_scale=length, train_bits=4)",
    "`rand`, ERK densities": "rand (train_bits=4)",
    "narrow ResNet-20": "small (train_bits=4)",
    "`low_rank`": "low_rank",
}


def test_the_tables_of_resnet20_are_those_of_the_results() -> None:
    """Rows `| method | 46.6 ± 0.7 in 14,088 | ... |` below bits; below, ratios and seconds."""
    folder = ROOT / "results" / "cifar10_resnet20"
    text = (folder / "README.md").read_text(encoding="utf-8").replace("**", "")
    runs, _ = read([folder / "runs.jsonl"])
    found = {(p.method, p.bits): p for p in points(runs, AXES["stored_bytes"])}
    shown = {key: f"{100 * p.y:.1f} ± {100 * (p.y_std or 0):.1f}" for key, p in found.items()}
    ((head, by_ratio),) = re.findall(r"^\| (\| 32 bits.*) \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    bits = [int(number) for number in re.findall(r"(\d+) bits", head)]
    for row in by_ratio.splitlines():
        method, *cells = row.strip("| ").split(" | ")
        keys = [(_RESNET20[method], number) for number in bits]
        assert cells == [f"{shown.pop(key)} in {found[key].x:,.0f}" for key in keys]
    (by_bytes,) = re.findall(r"^\| \| in 14,088 bytes.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    for row in by_bytes.splitlines():
        method, accuracy, ratio, seconds = row.strip("| ").split(" | ")
        key = _IN_4_BITS[method], 4
        assert accuracy.removesuffix(" (tie)") == shown.pop(key)
        assert ratio == f"{fmean(run.ratio for run in found[key].runs):.3f}"
        assert seconds == f"{fmean(run.fit_seconds for run in found[key].runs):.0f}"
    assert not shown
