"""A plan is run, interrupted and gone on with; its runs are those of a stand-in for train.py."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfold.reporting.reading import read
from memfold.runs.locks import locked
from memfold.studies.choose import main
from studies.plans import CONF, REPOSITORY, STAND_IN, write_plan

# The stand-in is best at 0.1, to which 0.03 is nearer than 1.
SMALL = {
    "methods": {"dense": ["compression=dense"], "mag": ["compression=mag"]},
    "choose": {"values": [0.03, 1.0], "at": {0.1: [0.3, 0.1]}},
}
NUM_RUNS = 2 * 2 + 2 + 2 * 2


def compare(folder: Path, **changes: object) -> int:
    plan = write_plan(folder, **(SMALL | changes))
    return main([str(plan), "--out", str(folder / "out"), "--jobs", "2"], STAND_IN, CONF)


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        (
            {"methods": {"sparse": ["compression=magg"]}},
            "methods.sparse",
            "compression=magg is unknown; available",
        ),
        ({"overrides": ["trainer.max_epoch=2"]}, "overrides", "trainer.max_epoch is no key"),
        (
            {"choose": SMALL["choose"] | {"key": "optimizer.rl"}},
            "choose.key",
            "optimizer.rl is no key",
        ),
        ({"choose": SMALL["choose"] | {"key": "optimizer"}}, "choose.key", "must be a string"),
    ],
)
def test_what_train_does_not_know_is_refused_before_anything_runs(
    changes: dict[str, object],
    place: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare(tmp_path, **changes) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {place}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_data_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["data=cifar10", f"data.root={tmp_path}", "data.download=false"]
    assert compare(tmp_path, overrides=own) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: data.root={tmp_path}: no cifar-10-binary.tar.gz in ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(runs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memfold.studies.choose.prepare_data", interrupt)
    assert compare(tmp_path) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"


def test_two_at_once_in_one_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert compare(tmp_path) == 1
    assert "out is in use by another process" in capsys.readouterr().err
    assert not starts(tmp_path)


def read_choices(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "out" / "choices.csv").read_text().splitlines()))


def starts(folder: Path) -> list[str]:
    """What each start of the stand-in has noted, over all runs."""
    files = sorted((folder / "out").rglob("starts"))
    return [line for file in files for line in file.read_text().splitlines()]


def test_each_method_runs_with_what_was_best_on_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"{NUM_RUNS} runs completed, 0 failed" in printed
    choices = read_choices(tmp_path)
    found = [(row["value"], row["chosen"], row["note"]) for row in choices]
    assert found == [("0.03", "yes", "edge of the list"), ("1", "", "")] * 2
    widen = "dense (edge of the list), mag 0.1 (edge of the list)"
    assert f"choose.values should have more of optimizer.lr for: {widen}\n" in printed
    assert all(float(row["val/acc"]) > 0 for row in choices)
    runs = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir() if path.is_dir())
    assert len(runs) == 6
    assert "dense-lr0.03-s1" in runs
    assert "mag-0.3-lr0.03-s2" in runs

    assert compare(tmp_path) == 0  # nothing is left to do
    assert starts(tmp_path) == ["new"] * NUM_RUNS


def test_runs_of_another_plan_wait_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"methods": {"dense": ["compression=dense"]}}
    names = ["dense-lr0.03-s1", "dense-lr0.03-s2"]
    out = tmp_path / "out"
    assert compare(tmp_path, **one) == 0
    first = (out / "runs" / names[0] / "result.json").read_bytes()
    (out / "runs" / f"{names[1]}.txt").unlink()  # as a kill in the middle of a move
    assert capsys.readouterr().err == ""
    assert compare(tmp_path, **one, choose={"values": [0.03, 0.1]}) == 0
    captured = capsys.readouterr()
    assert captured.err == f"not of this plan, kept in {out}/other_runs: {', '.join(names)}\n"
    assert {run.folder for run in read([out])[0]} == {run.folder for run in read([out / "runs"])[0]}
    assert {path.name for path in (out / "runs").glob("*/")} == {
        name.replace("0.03", "0.1") for name in names
    }
    before = len(starts(tmp_path))
    assert compare(tmp_path, **one) == 0
    assert len(starts(tmp_path)) == before  # nothing was run again
    assert (out / "runs" / names[0] / "result.json").read_bytes() == first
    assert not (out / "other_runs" / names[0]).exists()


def test_a_completed_run_without_the_metric_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path) == 0
    file = tmp_path / "out" / "choices" / "dense-lr0.03-s11" / "result.json"
    file.write_text('{"status": "completed", "metrics": {}}')
    assert compare(tmp_path) == 0
    assert "dense-lr0.03-s11: failed: its result has no val/acc" in capsys.readouterr().out
    [row] = [row for row in read_choices(tmp_path) if row["error"]]
    assert (row["method"], row["value"], row["chosen"]) == ("dense", "0.03", "")


def test_failures_are_recorded_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LARGEST_LR", "0.5")
    assert compare(tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"{NUM_RUNS - 2} runs completed, 2 failed" in printed
    assert "dense-lr1-s11: failed: the loss is nan at step 3" in printed
    failed = [row for row in read_choices(tmp_path) if row["value"] == "1"]
    assert {(row["val/acc"], row["chosen"], row["error"]) for row in failed} == {
        ("", "", "the loss is nan at step 3")
    }


def test_one_line_when_every_run_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LARGEST_LR", "0.001")
    assert compare(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: all runs failed, the last: ")
    assert error.count("\n") == 1


def test_choices_at_chance_level_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_CHANCE", "0.75")  # 0.3 is worth 0.84; three errors are 0.13
    assert compare(tmp_path, choose={"values": [0.01, 0.3, 10], "at": {0.1: [0.1]}}) == 0
    notes = [(row["value"], row["note"]) for row in read_choices(tmp_path)]
    assert notes == [("0.01", ""), ("0.3", "chance level"), ("10", "")] * 2
    assert "dense (chance level), mag 0.1 (chance level)\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_interrupted_loses_the_runs_in_flight_at_most(
    number: signal.Signals, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, **SMALL)
    code = "import sys; from pathlib import Path; from memfold.studies.choose import main;"
    command = [
        sys.executable,
        "-c",
        f"{code} sys.exit(main(sys.argv[2:], Path(sys.argv[1]), Path('conf')))",
    ]
    command += [str(STAND_IN), str(plan), "--out", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "STAND_IN_SECONDS": "0.3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").rglob("starts"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number is signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert error == "interrupted; the same command goes on\n"
    assert len(starts(tmp_path)) < NUM_RUNS
    results = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("result.json")]
    num_completed = sum(result["status"] == "completed" for result in results)
    assert num_completed >= 3

    assert main(command[4:], STAND_IN, CONF) == 0
    again = len(starts(tmp_path)) - NUM_RUNS
    assert 0 <= again <= 2  # one for each job
