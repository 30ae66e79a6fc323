"""Committed results and what is made of them agree."""

import re
from pathlib import Path

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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((name, table),) = re.findall(r"<!-- results/(\w+) -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
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
