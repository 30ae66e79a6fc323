import csv
import io

from memfold.reporting.page_data import page_data
from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Problem
from memfold.reporting.tables import to_csv, to_markdown
from reporting.fabricated import packed, result, write_run
from reporting.page.comparisons import one_run


def compare(folder):
    for seed, accuracy in ((1, 0.80), (2, 0.82)):
        one = result(seed=seed, accuracy=accuracy)
        written = write_run(folder / f"rps{seed}", one)
        write_run(written / "packed" / "8", packed(one, 8, accuracy - 0.1))
        write_run(folder / f"mag{seed}", result("mag", seed=seed, accuracy=accuracy - 0.3))
    write_run(folder / "dense", result("dense", accuracy=0.9, memory__peak_bytes=None))
    runs, problems = read([folder])
    assert problems == []
    return Comparison(tuple(runs), (Problem("a|b", "failed: <script>\nx"),))


def test_markdown_has_means_spreads_winners_and_problems(tmp_path):
    lines = to_markdown(compare(tmp_path), "A | B").splitlines()
    assert lines[0] == r"# A \| B"
    assert lines[2].startswith("5 runs. ")  # what was packed was trained once
    dense, rps, mag, rps_8 = (line for line in lines if " | 2,000,000 |" in line or "dense" in line)
    assert dense.startswith("| dense | 32 | 1 | 1 | 90.00 | - | 100,000 | 0 | 300,000 | - |")
    assert mag.startswith(
        "| mag | 32 | 0.1 | 2 | 51.00 \u00b1 1.41 | 38.29 to 63.71 | 10,025 | 24 |"
    )
    assert rps.startswith("| stable_rps | 32 | 0.1 | 2 | **81.00 \u00b1 1.41** |")
    assert rps_8.startswith(
        "| stable_rps | 8 | 0.1 | 2 | 71.00 \u00b1 1.41 | 58.29 to 83.71 | 2,506 |"
    )
    assert "| 0.1 | stable_rps: 81.00 \u00b1 1.41 % | - | 0 of 1 |" in lines
    assert "| stable_rps | 1-0-0 | - |" in lines
    assert "| mag | - | 0-0-1 |" in lines
    assert "## 1 problem" in lines
    assert r"- a\|b: failed: \<script\> x" in lines


def test_csv_has_plain_numbers(tmp_path):
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(tmp_path)))))
    assert [(row["method"], row["bits"]) for row in rows] == [
        ("dense", "32"),
        ("mag", "32"),
        ("stable_rps", "32"),
        ("stable_rps", "8"),
    ]
    assert rows[0]["peak_bytes"] == rows[0]["requested_ratio"] == rows[0]["accuracy_std"] == ""
    assert (rows[2]["num_seeds"], rows[2]["seeds"]) == ("2", "1 2")
    assert abs(float(rows[2]["accuracy"]) - 0.81) < 1e-12
    assert float(rows[2]["stored_bytes"]) == 10_025


def test_what_a_method_costs_in_trainings(tmp_path):
    training = {"rounds": 22, "epochs": 44.0, "steps": 880}
    for seed in (1, 2):
        contents = result("ltr", seed=seed, training=training, time__fit_seconds=70.0 + seed)
        write_run(tmp_path / str(seed), contents)
    write_run(tmp_path / "older", result("mag", training={}))
    runs, _ = read([tmp_path])
    lines = to_markdown(Comparison(tuple(runs)), "x").splitlines()
    (heads,) = (line.split(" | ") for line in lines if "stored bytes" in line)
    for name, costs in (("ltr", ["22", "71.5"]), ("mag", ["-", "3.5"])):
        (row,) = (line.split(" | ") for line in lines if line.startswith(f"| {name} | 32"))
        assert [row[heads.index(head)] for head in ("trainings", "training, s")] == costs
    rows = csv.DictReader(io.StringIO(to_csv(Comparison(tuple(runs)))))
    assert [(row["method"], row["trainings"]) for row in rows] == [("ltr", "22.0"), ("mag", "")]


def test_a_ratio_that_nobody_asked_for_is_no_cell_and_says_so():
    runs = [one_run("mag", ratio=0.1), one_run("mag", ratio=0.1, requested_ratio=None, seed=2)]
    table = to_markdown(Comparison(tuple(runs)), "x")
    assert "| mag | 32 | 0.1 | 1 |" in table
    assert "| mag | 32 | ~0.1 | 1 |" in table
    (setting,) = page_data(Comparison(tuple(runs)))["settings"]
    assert {row["ratio"] for row in setting["rows"]} == {"0.1", "~0.1"}
