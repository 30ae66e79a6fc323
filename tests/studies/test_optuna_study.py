"""Whole studies, in this process, with runs that take milliseconds."""

from pathlib import Path

import pytest

from studies.tuned import num_starts, report, settings, tune


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert tune(folder, 6) == 0
    return folder


def test_every_trial_is_a_run_folder_per_tuning_seed(done: Path) -> None:
    folders = {file.parent.relative_to(done / "study") for file in done.rglob("result.json")}
    tuning = {Path("trials", str(number), f"s{seed}") for number in range(6) for seed in (1, 2)}
    test = {Path("test", f"s{seed}") for seed in (11, 12)}
    assert folders == tuning | test


def test_the_best_is_chosen_by_the_mean_over_tuning_seeds_and_tested_with_the_others(
    done: Path,
) -> None:
    content = report(done)
    best = max(content["trials"], key=lambda trial: trial["value"])
    assert content["best"]["trial"] == best["trial"]
    assert content["best"]["setting"] == best["setting"]
    values = content["best"]["values"]
    assert values.keys() == {"1", "2"}
    assert values["2"] - values["1"] == pytest.approx(0.001)
    assert best["value"] == pytest.approx(sum(values.values()) / 2)
    test = content["test"]
    assert [run["seed"] for run in test["runs"]] == [11, 12]
    assert test["test/acc"]["mean"] == pytest.approx((best["value"] - 0.0015 + 0.0115) / 2)
    assert test["test/acc"]["std"] == pytest.approx(0.0005 / 2**0.5)
    assert content["num_trials"] == {"completed": 6, "pruned": 0, "failed": 0}


def test_no_run_of_a_trial_looks_at_the_test_data(done: Path) -> None:
    files = [*(done / "study" / "trials").rglob("result.json")]
    assert len(files) == 6 * 2
    assert not any("test/acc" in file.read_text() for file in files)


def test_the_report_says_which_seeds_chose_and_which_test(done: Path) -> None:
    text = (done / "study" / "report.md").read_text()
    assert "**tuning seeds 1, 2**" in text
    assert "**test seeds 11, 12**" in text
    assert "**Test accuracy" in text
    assert "6 trials completed, 0 pruned, 0 failed" in text
    assert text.count("| completed |") == 6
    assert "float from 0.001 to 1, log" in text


def test_the_same_command_does_nothing_again_and_more_trials_go_on(
    done: Path, capsys: pytest.CaptureFixture
) -> None:
    before, starts = settings(done), num_starts(done)
    assert tune(done, 6) == 0
    assert num_starts(done) == starts
    assert tune(done, 10) == 0
    assert settings(done)[:6] == before
    assert num_starts(done / "study" / "trials") == 20
    assert "10 of 10 trials done" in capsys.readouterr().out


def test_same_seed_same_settings_and_another_seed_others(done: Path, tmp_path: Path) -> None:
    for name, seed, num_trials in (("same", 0, 6), ("other", 1, 1)):
        (tmp_path / name).mkdir()
        sampler = {"seed": seed, "startup_trials": 4}
        assert tune(tmp_path / name, num_trials, sampler=sampler) == 0
    assert settings(tmp_path / "same") == settings(done)[:6]
    assert settings(tmp_path / "other")[0] != settings(done)[0]
    assert len({str(setting) for setting in settings(done)}) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seeds": [1, 3]}, "space.tuning_seeds '1 2', not '1 3'"),
        (
            {"parameters": {"optimizer.lr": {"float": {"low": 0.01, "high": 1.0}}}},
            "space.parameters.optimizer.lr.float.low 0.001, not 0.01",
        ),
    ],
)
def test_another_space_is_refused(
    done: Path, changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    starts = num_starts(done)
    assert tune(done, 20, **changes) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert num_starts(done) == starts


def test_failed_runs_are_recorded_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LARGEST_LR", "0.3")
    assert tune(tmp_path, 3, tuning_seeds=[1]) == 0
    content = report(tmp_path)
    failed = [trial for trial in content["trials"] if trial["state"] == "failed"]
    assert content["num_trials"]["completed"] == 3
    assert failed
    assert all(trial["setting"]["optimizer.lr"] > 0.3 for trial in failed)
    assert {trial["error"] for trial in failed} == {"the loss is nan at step 3"}
    assert "the loss is nan at step 3" in (tmp_path / "study" / "report.md").read_text()


def test_when_all_trials_fail_the_study_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("STAND_IN_LARGEST_LR", "0")
    assert tune(tmp_path, 3) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "all trials failed, the last: the loss is nan at step 3" in error
    assert report(tmp_path)["num_trials"]["failed"] == 3
    assert not (tmp_path / "study" / "test").exists()


def test_hopeless_trials_are_stopped_and_their_other_seeds_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "0.05")
    pruner = {"startup_trials": 2, "warmup_epochs": 1}
    assert tune(tmp_path, 6, pruner=pruner) == 0
    content = report(tmp_path)
    counts = content["num_trials"]
    assert counts["pruned"] >= 1
    assert counts["completed"] + counts["pruned"] == 6
    for trial in content["trials"]:
        folder = tmp_path / "study" / "trials" / str(trial["trial"])
        assert (folder / "s2").exists() == (trial["state"] == "completed")
        if trial["state"] == "pruned":
            assert trial["epochs_judged"] == 2  # the first is warm-up


def test_a_metric_that_is_better_when_smaller_chooses_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "0.05")
    objective = {"metric": "val/bpb", "direction": "minimize"}
    pruner = {"startup_trials": 2, "warmup_epochs": 1}
    assert tune(tmp_path, 6, objective=objective, pruner=pruner) == 0
    content = report(tmp_path)
    assert content["num_trials"]["pruned"] >= 1
    completed = [trial["value"] for trial in content["trials"] if trial["state"] == "completed"]
    assert content["best"]["value"] == min(completed)
    mean = content["test"]["test/bpb"]["mean"]
    assert mean == pytest.approx(content["best"]["value"] + 1 + 0.0015 - 0.0115)
    text = (tmp_path / "study" / "report.md").read_text()
    assert "smallest mean `val/bpb`" in text
    assert "best `val/bpb` so far" in text
    assert f"**Test bpb {mean:.4g}" in text
    assert f"test bpb {mean:.4g}" in capsys.readouterr().out


def test_a_better_setting_found_later_is_tested_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parameters = {"optimizer.lr": {"float": {"low": 0.001, "high": 0.1, "log": True}}}
    assert tune(tmp_path, 1, tuning_seeds=[1], parameters=parameters) == 0
    first = report(tmp_path)
    assert tune(tmp_path, 5, tuning_seeds=[1], parameters=parameters) == 0
    later = report(tmp_path)
    assert later["best"]["trial"] != 0
    assert later["test"]["test/acc"]["mean"] > first["test"]["test/acc"]["mean"]
    assert (tmp_path / "study" / "test" / ".replaced" / "1" / "s11" / "result.json").exists()


def test_a_failed_test_run_is_an_error_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert tune(tmp_path, 2) == 0
    run = tmp_path / "study" / "test" / "s12"
    accuracy = report(tmp_path)["test"]["test/acc"]
    (run / "result.json").write_text('{"status": "failed"}')
    (run / "checkpoints" / "last.ckpt").write_text("2")
    assert tune(tmp_path, 2) == 0
    assert (run / "starts").read_text() == "new\nresume\n"
    assert report(tmp_path)["test"]["test/acc"] == accuracy
    (run / "result.json").write_text('{"status": "failed"}')
    (run / "checkpoints" / "last.ckpt").write_text("damaged")
    assert tune(tmp_path, 2) == 0
    assert (run / "starts").read_text() == "new\n"  # replaced
    assert report(tmp_path)["test"]["test/acc"] == accuracy


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("x")
    assert tune(tmp_path, 2) == 1
    assert "is no study" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "study").iterdir()] == ["thesis.tex"]


def test_a_damaged_database_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.db").write_bytes(b"no database" * 100)
    assert tune(tmp_path, 2) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "study.db cannot be used: " in error
