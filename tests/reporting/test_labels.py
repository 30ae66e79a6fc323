import json
import re

import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Setting
from memfold.reporting.run_lines import to_run_lines
from memfold.reporting.statistics import AXES, points
from memfold.reporting.tables import to_csv
from reporting.fabricated import result, write_run

PRICE = {"data.file": "/a/flats.csv", "data.target": "price", "data.batch_size": 64}
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


def test_other_files_and_targets_are_never_averaged_nor_left_out(tmp_path, monkeypatch):
    """Of results from before data said which they are, and of those that do."""
    monkeypatch.chdir(tmp_path)
    said = {"file": "/a/flats.csv", "target": "price"}
    runs = {
        "price": {"recipe": PRICE},
        "age": {"recipe": {**PRICE, "data.target": "age"}},
        "again": {"recipe": {"data.file": "flats.csv"}, "data_source": said, "seed": 2},
        "other": {"recipe": {**PRICE, "data.file": "/b/flats.csv"}, "seed": 3},
    }
    for name, changes in runs.items():
        write_run(tmp_path / name, result(data="table", **changes))
    found, problems = read(["price", "age"])
    assert {run.folder: run.setting.data for run in found} == {
        "price": "table flats.csv, price",
        "age": "table flats.csv, age",
    }
    found, problems = read(list(runs))
    assert problems == []
    assert {run.folder: run.setting.data for run in found} == {
        "price": "table a/flats.csv, price",
        "again": "table a/flats.csv, price",
        "age": "table a/flats.csv, age",
        "other": "table b/flats.csv, price",
    }
    assert sorted(len(point.runs) for point in points(found, AXES["ratio"])) == [1, 1, 2]
    lines = tmp_path / "runs.jsonl"
    lines.write_text(to_run_lines(Comparison(tuple(found))))
    assert read([lines])[0] == found
    kept = [line for line in lines.read_text().splitlines() if '"/b/' not in line]
    older = "\n".join(re.sub(r'"source":{.*?},"strategy"', '"strategy"', line) for line in kept)
    lines.write_text(older.replace("a/flats.csv, ", "flats.csv, ") + "\n")
    assert len({run.setting for run in read([lines])[0]}) == 3  # `again` was relative


def test_folds_are_averaged_like_seeds_and_never_with_another_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fold in (None, 0, 1, 2):
        recipe = {"data.fold": fold, "data.num_folds": 3}
        command = f"python train.py data.fold={fold}"
        contents = result(recipe=recipe, command=command, accuracy=0.7 + (fold or 0) / 100)
        write_run(tmp_path / f"{fold}", contents)
    runs, problems = read(["None", "0", "1", "2"])
    assert problems == []
    split, folds = sorted(points(runs, AXES["ratio"]), key=lambda point: len(point.runs))
    assert (split.setting.data, folds.setting.data) == ("digits", "digits folds=3")
    assert [run.fold for run in folds.runs] == [0, 1, 2]
    assert (folds.y, folds.y_std) == (pytest.approx(0.71), pytest.approx(0.01))
    row = to_csv(Comparison(tuple(folds.runs))).splitlines()[1]
    assert ",1,1,0 1 2," in row
    write_run(tmp_path / "copy", json.loads((tmp_path / "2" / "result.json").read_text()))
    assert [p.folder for p in read(["2", "copy"])[1]] == ["copy"]
