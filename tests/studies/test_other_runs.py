"""Results of other settings, in a moved study or a run folder in use, are not taken for ours."""

import json
import shutil
from pathlib import Path

import pytest

from memfold.reporting.reading import read
from memfold.studies.optuna_search import main
from memfold.studies.runner import Runner
from studies.tuned import CONF, STAND_IN, arguments, num_starts

ONE_RUN = {"tuning_seeds": [1], "test_seeds": [11]}
GIVEN = ("optimizer.lr=0.1", "trainer.max_epochs=2", "seed=1")
OTHER = ("optimizer.lr=0.01", "trainer.max_epochs=2", "seed=1")


def tune_in(study: Path, num_trials: int, **changes: object) -> int:
    command = arguments(study.parent, num_trials, **ONE_RUN, **changes)
    command[command.index("--study") + 1] = str(study)
    return main(command, STAND_IN, CONF)


def test_a_moved_study_goes_on_as_itself_and_keeps_its_space(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study, moved = tmp_path / "study", tmp_path / "moved"
    assert tune_in(study, 1) == 0
    first = json.loads((study / "report.json").read_text())["trials"]
    study.rename(moved)
    assert tune_in(moved, 2) == 0
    content = json.loads((moved / "report.json").read_text())
    assert content["trials"][:1] == first
    assert content["study"] == "moved"
    assert (moved / "experiment" / "moved.yaml").exists()
    assert num_starts(moved / "trials") == 2

    copy = tmp_path / "copy"
    shutil.copytree(moved, copy)
    capsys.readouterr()
    other = {"optimizer.lr": {"float": {"low": 0.01, "high": 0.02}}}
    assert tune_in(copy, 2, parameters=other) == 1
    error = capsys.readouterr().err
    assert "was started with space.parameters" in error
    assert error.count("\n") == 1


def test_a_study_without_its_database_finds_its_runs(tmp_path: Path) -> None:
    study = tmp_path / "study"
    assert tune_in(study, 2) == 0
    (study / "study.db").unlink()
    assert tune_in(study, 2) == 0  # the same settings are drawn
    assert num_starts(study / "trials") == 2
    assert tune_in(study, 3) == 0


def test_a_result_of_other_overrides_is_not_used(tmp_path: Path) -> None:
    runner, folder = Runner(STAND_IN), tmp_path / "0" / "s1"
    first = runner.run(GIVEN, folder)
    (folder / "mark").touch()
    assert runner.run(GIVEN, folder) == first
    assert (folder / "mark").exists()
    assert runner.run(OTHER, folder)["metrics"] != first["metrics"]
    assert not (folder / "mark").exists()
    for number in (1, 2):  # nothing that was saved is lost
        aside = folder.parent / ".replaced" / str(number)
        given = (OTHER, GIVEN)[number % 2]
        assert json.loads((aside / "s1.overrides.json").read_text()) == list(given)
        assert json.loads((aside / "s1" / "result.json").read_text())["status"] == "completed"
        runner.run(given, folder)
    assert not any(".replaced" in str(found) for kind in read([tmp_path]) for found in kind)


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    runner, folder = Runner(STAND_IN), tmp_path / "0" / "s1"
    runner.run(GIVEN, folder)
    for given, starts in ((GIVEN, "new\nresume\n"), (OTHER, "new\n")):
        (folder / "result.json").write_text('{"status": "failed"}')
        (folder / "checkpoints" / "last.ckpt").write_text("1")
        runner.run(given, folder)
        assert (folder / "starts").read_text() == starts


def test_runs_do_not_take_the_variables_of_a_batch_job_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")  # as in a script for sbatch, without submitit
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    assert Runner(STAND_IN).run(GIVEN, tmp_path / "s1")["status"] == "completed"
