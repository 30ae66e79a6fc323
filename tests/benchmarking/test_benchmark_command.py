import json

import pytest

from memfold.benchmarking import benchmark_command
from memfold.benchmarking.benchmark_command import main


@pytest.fixture
def launched(monkeypatch):
    """Cases that would have been measured; those of low_rank fail."""
    cases = []

    def launch(case):
        cases.append(case)
        if case.strategy == "low_rank":
            return {"error": "RuntimeError: no"}
        parts = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes")
        seconds = 0.1 if case.is_dense else 0.2
        found = {"step_seconds": seconds, **dict.fromkeys(("peak_bytes", *parts), 100)}
        return {**found, "steps": [seconds]}

    monkeypatch.setattr(benchmark_command, "launch", launch)
    return cases


def test_all_combinations_are_measured(launched, tmp_path, capsys):
    lists = ["--models", "mlp_tiny", "--strategies", "dense,stable_rps", "--ratios", "0.1,0.01"]
    flags = ["--dtypes", "float32,amp_bf16", "--rounds", "2", "--steps", "7", "--threads", "1"]
    assert main([*lists, *flags, "--batch-size", "4", "--out", str(tmp_path / "out")]) == 0
    one_round = [(None, "dense"), (0.1, "stable_rps"), (0.01, "stable_rps")]
    assert [(case.ratio, case.strategy) for case in launched] == one_round * 2 * 2
    assert [case.dtype for case in launched] == ["float32"] * 6 + ["amp_bf16"] * 6
    assert {(case.steps, case.warmup, case.batch_size) for case in launched} == {(7, 3, 4)}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["status"] == "completed"
    assert [e["relative"]["step_seconds"]["median"] for e in results["cases"]] == [1, 2, 2] * 2
    assert "stable_rps 0.01" in (tmp_path / "out" / "table.md").read_text()
    assert "round 2 of 2: 200 ms a step" in capsys.readouterr().out


def test_a_failed_case_is_recorded_and_the_others_go_on(launched, tmp_path):
    strategies = ["--strategies", "low_rank,stable_rps", "--ratios", "0.1"]
    assert main(["--models", "mlp_tiny", *strategies, "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    statuses = {entry["name"]: entry["status"] for entry in results["cases"]}
    assert statuses == {
        "dense": "completed",
        "low_rank 0.1": "failed",
        "stable_rps 0.1": "completed",
    }
    assert results["cases"][1]["error"] == "RuntimeError: no"


def test_a_preset_can_be_narrowed_to_some_of_its_models(launched, tmp_path, capsys):
    assert main(["--preset", "quick", "--models", "mlp_tiny", "--out", str(tmp_path)]) == 0
    assert {case.model for case in launched} == {"mlp_tiny"}
    assert main(["--preset", "quick", "--models", "gpt"]) == 2
    assert "--models gpt: unknown; allowed: mlp_tiny, resnet20" in capsys.readouterr().err
    assert main(["--preset", "quick", "--ratios", "0.1"]) == 2
    assert "--ratios and --preset quick: give one of them" in capsys.readouterr().err


def test_pictures_are_drawn_after_the_run_or_later(launched, tmp_path):
    arguments = ["--models", "mlp_tiny", "--rounds", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--plot"]) == 0
    picture = tmp_path / "step_time.png"
    before = picture.read_bytes()
    picture.unlink()
    num_launched = len(launched)
    assert main(["--plot", str(tmp_path / "results.json")]) == 0
    assert picture.read_bytes() == before
    assert len(launched) == num_launched


def test_the_list_shows_what_would_run(launched, capsys):
    assert main(["--list", "--models", "gpt", "--strategies", "roast:bits=8"]) == 0
    shown = capsys.readouterr().out
    assert "roast 0.01 bits=8" in shown
    assert "model gpt: GPT-like" in shown
    assert "preset figures" in shown
    assert launched == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nothing"], "--models nothing: unknown; allowed: mlp_tiny"),
        (["--models", ","], "--models: name at least one of"),
        (["--strategies", ","], "--strategies: name at least one"),
        (["--ratios", "2"], "--ratios 2: must be numbers in (0, 1]"),
        (["--ratios", "a"], "--ratios a: must be numbers in (0, 1]"),
        (["--dtypes", "int8"], "--dtypes int8: unknown"),
        (["--compiled", "yes"], "--compiled yes: unknown; allowed: eager, compiled"),
        (["--device", "abacus"], "--device abacus: unknown"),
        (["--plot", "nothing.json"], "nothing.json: cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(launched, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert launched == []


def test_results_are_not_overwritten(launched, tmp_path, capsys):
    (tmp_path / "results.json").write_text("kept")
    assert main(["--models", "mlp_tiny", "--out", str(tmp_path)]) == 2
    assert "has a results.json already" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "kept"
    assert launched == []


def test_an_interrupted_run_keeps_the_groups_that_were_done(launched, monkeypatch, tmp_path):
    before = benchmark_command.launch

    def launch(case):
        if case.model == "gpt":
            raise KeyboardInterrupt
        return before(case)

    monkeypatch.setattr(benchmark_command, "launch", launch)
    assert main(["--models", "mlp_tiny,gpt", "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "running"
    assert {entry["case"]["model"] for entry in results["cases"]} == {"mlp_tiny"}
