import csv
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfold.reporting.report_command import main
from reporting.fabricated import result, write_run

ROOT = Path(__file__).parents[2]


def test_the_script_writes_a_report_that_can_be_drawn_again(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"a{seed}", result(seed=seed))
        write_run(tmp_path / "runs" / f"b{seed}", result("mag", seed=seed, accuracy=0.5))
    write_run(tmp_path / "runs" / "c", result(status="failed", error="out of memory"))
    out = tmp_path / "report"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    script = [sys.executable, str(ROOT / "scripts" / "report.py")]
    done = subprocess.run(
        [*script, "runs", "--out", "report", "--title", "Two methods"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "runs/c: failed: out of memory (stable_rps, ratio 0.1, seed 1)\n"
    assert done.stdout.splitlines()[0] == (
        "4 runs of 2 methods in 1 setting (data, backbone, metric), 1 problem"
    )
    assert done.stdout.splitlines()[-1] == "report: report/index.html"
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"index.html", "table.md", "table.csv", "runs.jsonl", "notes.md"} < files
    assert {"plots/digits-mlp-stored_bytes.png", "plots/digits-mlp-stored_bytes.pdf"} < files
    assert not any(name.endswith(".partial") for name in files)
    assert "Two methods" in (out / "index.html").read_text()

    again = tmp_path / "again"
    assert main([str(out / "runs.jsonl"), "--out", str(again), "--title", "Two methods"]) == 0
    for name in sorted(files - {"notes.md"}):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_nothing_to_draw_is_an_error_that_names_every_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result(status="failed", error="out of memory"))
    assert main(["a", "nowhere", "--out", "report"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "a: failed: out of memory (stable_rps, ratio 0.1, seed 1)",
        "nowhere: does not exist",
        "error: nothing to draw: no completed run in a, nowhere",
    ]
    assert not (tmp_path / "report").exists()


def test_each_problem_is_one_line_on_any_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a\nb", result(status="failed", error="one\ntwo\x1b[31m \u00e9"))
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["a\nb", "--out", "report"]) == 1
    stream.seek(0)
    assert stream.read().splitlines() == [
        "a b: failed: one two [31m \\xe9 (stable_rps, ratio 0.1, seed 1)",
        "error: nothing to draw: no completed run in a b",
    ]


def test_bad_published_curves_stop_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result())
    (tmp_path / "p.csv").write_text("method,dataset,model,ratio,accuracy\nx,digits,mlp,0.1,93\n")
    assert main(["a", "--out", "report", "--reference", "p.csv"]) == 1
    assert capsys.readouterr().err.startswith("error: p.csv line 2: accuracy must be a number")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result())
    (tmp_path / "file").write_text("")
    assert main(["a", "--out", "file"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write file")


def test_published_curves_and_odd_names_reach_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a </script> | b", result(error="\ud800"))
    write_run(tmp_path / "bad", result(status="failed", error="\ud800 lost"))
    (tmp_path / "p.csv").write_text(
        "method,dataset,model,ratio,accuracy\nsnip,digits,mlp,0.1,0.9\n"
    )
    assert main([".", "--out", "report", "--reference", "p.csv"]) == 0
    assert "bad: failed: \\ud800 lost" in capsys.readouterr().err
    table = (tmp_path / "report" / "table.md").read_text()
    assert "| snip | 0.1 | 90.00 |" in table
    with (tmp_path / "report" / "table.csv").open() as file:
        assert next(csv.DictReader(file))["method"] == "stable_rps"


def test_a_report_starts_without_the_libraries_of_training():
    code = (
        "import sys, memfold.reporting.report_command, memfold.reporting.plots, "
        "memfold.reporting.page; print(*{m.split('.')[0] for m in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "matplotlib" in loaded
    assert not {"lightning", "hydra", "omegaconf", "wandb", "sklearn", "pandas"} & set(loaded)


@pytest.mark.slow
def test_500_runs_take_less_than_half_a_minute(tmp_path):
    rows = [
        {"step": n, "val/acc": 0.5, "train/loss": 0.1, **{f"density/{t}": 0.1 for t in range(20)}}
        for n in range(200)
    ]
    for number in range(500):
        name = ("mag", "snip", "rigl", "stable_rps", "roast")[number % 5]
        ratio = (0.3, 0.1, 0.03, 0.01, 0.003)[number // 5 % 5]
        contents = result(name, ratio, number // 25, 0.3 + number / 1000)
        write_run(tmp_path / "runs" / str(number), contents, rows)
    started = time.process_time()
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert time.process_time() - started < 30
