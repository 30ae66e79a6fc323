import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Setting
from memfold.reporting.run_lines import to_run_lines
from memfold.reporting.statistics import AXES, points
from reporting.fabricated import result, write_run

NARROW, WIDE = (Setting("digits", f"mlp ({size} bytes)") for size in ("100,000", "400,000"))


@pytest.fixture
def two_widths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "narrow", result(seed=1))
    write_run(tmp_path / "wide", result(seed=2, memory__dense_bytes=400_000))


def test_backbones_of_one_name_and_two_sizes_are_never_averaged(two_widths):
    runs, problems = read(["narrow", "wide"])
    assert {run.folder: run.setting for run in runs} == {"narrow": NARROW, "wide": WIDE}
    assert [len(point.runs) for point in points(runs, AXES["ratio"])] == [1, 1]
    assert problems == []


def test_sizes_are_named_where_there_are_two_of_what_is_compared_now(two_widths, tmp_path):
    runs, _ = read(["narrow", "wide"])
    (tmp_path / "both.jsonl").write_text(to_run_lines(Comparison(tuple(runs))))
    (tmp_path / "wide.jsonl").write_text(to_run_lines(Comparison(tuple(runs[1:]))))
    assert read(["both.jsonl"])[0] == runs
    assert read(["both.jsonl", "wide"])[0] == runs
    (alone,) = read(["wide.jsonl"])[0]
    assert alone.setting == Setting("digits", "mlp")
    assert {run.setting for run in read(["wide.jsonl", "narrow"])[0]} == {NARROW, WIDE}
