"""Studies go by the primary metric of results, whichever way is better."""

import csv
import io
import json
from pathlib import Path

import pytest

from memfold.runs.folder import JOB_NOTES
from memfold.runs.primary import ACCURACY, Primary, primary_of
from memfold.runs.sweep import JobNote, SweepPlan
from memfold.studies.choose import _best, _table
from memfold.studies.choose_plan import PlannedRun
from memfold.studies.runner import Outcome
from memfold.studies.sweep_job import objective_of
from memfold.studies.sweep_report import describe_end, print_table
from memfold.studies.tuning_report import show_test

BPB = {"name": "val/bpb", "mode": "min", "unit": "bits per byte"}
RUNS = [PlannedRun(f"lr{lr}", "dense", None, lr, ()) for lr in (0.1, 0.2, 0.3)]


def outcomes(primary: dict[str, str] | None, name: str) -> dict[str, Outcome]:
    results = [{"metrics": {name: value}, "primary": primary} for value in (2.5, 2.25, 2.75)]
    return {run.name: Outcome(r, "", 1.0) for run, r in zip(RUNS, results, strict=True)}


@pytest.mark.parametrize(
    ("primary", "name", "best"), [(BPB, "val/bpb", "lr0.2"), (None, "val/acc", "lr0.3")]
)
def test_the_best_is_chosen_by_the_direction(
    primary: dict[str, str] | None, name: str, best: str
) -> None:
    found = outcomes(primary, name)
    chosen = _best(RUNS, found)
    assert chosen.name == best
    rows = list(csv.DictReader(io.StringIO(_table("ratio", [RUNS], {chosen.name: []}, found))))
    assert [row[name] for row in rows] == ["2.5000", "2.2500", "2.7500"]
    assert [row["value"] for row in rows if row["chosen"]] == [best.removeprefix("lr")]


def test_a_job_is_said_with_its_metric() -> None:
    result = {"status": "completed", "primary": BPB, "metrics": {"test/bpb": 2.5, "test/acc": 1.0}}
    assert describe_end(result, 1.0) == "completed, test/bpb 2.5, 1.0 s"


@pytest.mark.parametrize("files", [("a.csv", "a.csv"), ("a.csv", "b.csv")])
def test_the_table_of_a_sweep_writes_metrics_as_runs_do_and_names_the_best(
    tmp_path: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rmse = {"name": "val/rmse", "mode": "min", "unit": "RMSE"}
    (tmp_path / JOB_NOTES).mkdir(parents=True)
    for number, (file, asked) in enumerate(zip(files, (0.1, None), strict=True)):
        (tmp_path / str(number)).mkdir()
        contents = {
            "status": "completed",
            "data": "table",
            "data_source": {"file": file},
            "primary": rmse,
            "metrics": {"test/rmse": 65591.2 + number},
            "compression": {"name": "mag", "ratio": 0.09999, "requested_ratio": asked},
            "memory": {"stored_bytes": 29532},
        }
        (tmp_path / str(number) / "result.json").write_text(json.dumps(contents))
        JobNote(number=number, folder=str(number), overrides=[], attempt=1).note(tmp_path)
    plan = SweepPlan(command="", arguments=[], jobs=[[], []], attempt=1)
    assert print_table(tmp_path, plan) == (2, 0, 0)
    said = capsys.readouterr().out
    assert "test/rmse (lower is better)" in said
    cells = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    rows = [row for row in cells if "completed" in row]
    is_one_file = files[0] == files[1]
    assert [row[6] for row in rows] == ["65,591 best" if is_one_file else "65,591", "65,592"]
    assert [(row[3], row[7]) for row in rows] == [("0.1", "29,532")] * 2


@pytest.mark.parametrize(
    ("primary", "std", "said"),
    [
        (ACCURACY, None, "test accuracy 50.00 %"),
        (ACCURACY, 0.01, "test accuracy 50.00 ± 1.00 %"),
        (Primary("val/rmse", "min", "RMSE"), 0.01, "test RMSE 0.5 ± 0.01"),
    ],
)
def test_what_tuning_has_tested_is_written_as_runs_do(
    primary: Primary, std: float | None, said: str
) -> None:
    assert show_test({"mean": 0.5, "std": std}, primary) == said


def test_a_sweeper_gets_the_primary_metric(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    (tmp_path / JOB_NOTES).mkdir(parents=True)
    result = {"status": "completed", "primary": BPB, "metrics": {"val/bpb": 2.5, "val/acc": 1.0}}
    (folder / "result.json").write_text(json.dumps(result))
    JobNote(number=0, folder="0", overrides=[], attempt=0).note(tmp_path)
    assert objective_of(tmp_path, 0) == 2.5


def test_results_without_one_are_of_classifications() -> None:
    assert primary_of({}) == primary_of({"primary": None}) == ACCURACY
    found = primary_of({"primary": BPB})
    assert found == Primary("val/bpb", "min", "bits per byte")
    assert (found.test, found.sign, found.title) == ("test/bpb", -1, "bits per byte")
    assert ACCURACY.show(0.5) == "50.00 %"
    assert found.show(2.5) == "2.5"
    assert found.tested({"test/bpb": 2.0, "packed/test/bpb": 3.0}) == 3.0
