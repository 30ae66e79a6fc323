import functools
import json
import math
from pathlib import Path

import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Comparison
from memfold.reporting.run_lines import to_run_lines
from reporting.fabricated import packed, result, write_run, write_sweep


def write_everything(folder):
    contents = result("rigl", compression__fraction=0.3, compression__decay=None)
    rows = [{"step": n, "train/loss": 1 / 3 / (n + 1), "density/a": 0.1} for n in range(500)]
    one = write_run(folder / "one", contents, rows)
    write_run(one / "packed" / "8", packed(contents, 8, 1 / 3))
    write_run(folder / "two", result("rigl", seed=2, compression__fraction=0.5))
    write_run(folder / "dense", result("dense"))
    write_run(folder / "again", result("dense"))
    write_run(folder / "short", result("dense", seed=3, training={"epochs": 1.0, "steps": 30}))
    write_run(folder / "failed", result(status="failed", error="a | b"))
    write_sweep(folder / "sweep", [["seed=1"]], started=[])


def test_what_was_written_is_read_back_without_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_everything(tmp_path / "runs")
    runs, problems = read(["runs"])
    assert len(runs) == 5
    assert len(problems) == 5
    comparison = Comparison(tuple(runs), tuple(problems))
    (tmp_path / "runs.jsonl").write_text(to_run_lines(comparison))
    again = read(["runs.jsonl"])
    assert Comparison(tuple(again[0]), tuple(again[1])) == comparison
    both = read(["runs", "runs.jsonl", "runs.jsonl"])
    assert Comparison(tuple(both[0]), tuple(both[1])) == comparison


def test_methods_are_named_anew_when_other_runs_join(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result(compression__gradient_scale="length"))
    write_run(tmp_path / "b", result(compression__gradient_scale="projection"))
    runs, _ = read(["a"])
    (tmp_path / "old.jsonl").write_text(to_run_lines(Comparison(tuple(runs))))
    runs, _ = read(["old.jsonl", "b"])
    assert [run.method for run in runs] == [
        "stable_rps (gradient_scale=length)",
        "stable_rps (gradient_scale=projection)",
    ]


def test_runs_of_two_places_with_one_name_are_two_runs(tmp_path, monkeypatch):
    for place, strategy in (("x", "mag"), ("y", "snip")):
        write_run(tmp_path / place / "outputs" / "0", result(strategy))
        write_run(tmp_path / place / "outputs" / "1", result("dense", accuracy=0.9))
        monkeypatch.chdir(tmp_path / place)
        runs, _ = read(["outputs"])
        Path("runs.jsonl").write_text(to_run_lines(Comparison(tuple(runs))))
    monkeypatch.chdir(tmp_path)
    runs, problems = read(["x/runs.jsonl", "y/runs.jsonl"])
    assert [(run.folder, run.method) for run in runs] == [
        ("outputs/1", "dense"),
        ("outputs/0", "mag"),
        ("outputs/0", "snip"),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"accuracy": 2}, "accuracy must be at most 1, got 2"),
        ({"requested_ratio": 0}, "requested_ratio must be at least 1e-09"),
        ({"folder": "a\0b"}, "folder must be a text without NUL, got 'a\\x00b'"),
        ({"kind": "walk"}, "kind must be 'run' or 'problem', got 'walk'"),
        ({"setting": "digits"}, "setting must be a mapping, got 'digits'"),
        ({"curves": {"val/acc": {"steps": [1], "values": []}}}, "as many steps as values"),
        (
            {"curves": {"val/acc": {"steps": [1.5], "values": [1]}}},
            "0 must be a whole number",
        ),
        (
            {"curves": {"val/acc": {"steps": [1], "values": [None]}}},
            "0 must be a number, got",
        ),
        (
            {"curves": {"val/acc": {"steps": [2**60], "values": [1]}}},
            "0 must be below 900719",
        ),
        ({"densities": {"a": 3}}, "densities.a must be at most 1, got 3"),
        ({"options": {"fraction": 10**400}}, "is too large"),
        ({"options": {"fraction": math.nan}}, "JSON knows no NaN"),
        ({"options": functools.reduce(lambda inner, _: [inner], range(600), {})}, "nested"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result())
    write_run(tmp_path / "b", result(seed=2))
    runs, _ = read(["a", "b"])
    good, bad = to_run_lines(Comparison(tuple(runs))).splitlines()
    bad = json.dumps({**json.loads(bad), **change})
    (tmp_path / "runs.jsonl").write_text(f"{good}\n\n{bad}\n{good[:50]}\n[]\n")
    found, problems = read(["runs.jsonl"])
    assert [run.folder for run in found] == ["a"]
    assert [problem.folder for problem in problems] == [
        f"runs.jsonl line {number}" for number in (3, 4, 5)
    ]
    assert reason in problems[0].reason


def test_a_line_of_other_bytes_and_one_of_any_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", result())
    line = to_run_lines(Comparison(tuple(read(["a"])[0]))).encode()
    Path("runs.jsonl").write_bytes(line + b"\xff\n" + line)
    assert [problem.folder for problem in read(["runs.jsonl"])[1]] == ["runs.jsonl line 2"]
    with Path("runs.jsonl").open("wb") as file:
        file.write(line)
        file.truncate(2**40)
    runs, (problem,) = read(["runs.jsonl"])
    assert (len(runs), problem.folder) == (1, "runs.jsonl line 2")


def test_a_file_that_holds_something_else_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "run.log").write_text("epoch 1\n" * 1000)
    (tmp_path / "results.json").write_text('{\n  "kind": "other"\n}\n')
    for name in ("picture.png", "run.log", "results.json"):
        runs, (problem,) = read([name])
        assert runs == []
        assert problem.folder == name
        assert problem.reason.startswith("holds no line of a runs.jsonl: ")
