"""What a user sees in W&B, read back from the files of runs that were offline."""

import csv
import hashlib
import json
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from memfold.errors import InputError
from memfold.runs.folder import read_result
from memfold.runs.result import describe_environment
from memfold.training import run
from training.jobs import SMALL, compose_job
from training.wandb_files import OfflineRun, offline_runs
from wandb_processes import forget_wandb

OFFLINE = (*SMALL, "logger=wandb", "logger.mode=offline")
STEP = "trainer/global_step"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In place of the clone: one change that is not committed, one file that git does not know.

    Variables of whoever runs the tests are out of the way.
    """
    clone = tmp_path_factory.mktemp("clone")
    (clone / "code.py").write_text("old = 1\n")
    for arguments in (
        ["init", "-q"],
        ["add", "code.py"],
        ["-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *arguments], cwd=clone, check=True)
    (clone / "code.py").write_text("new = 2\n")
    (clone / "secret.txt").write_text("password")
    with pytest.MonkeyPatch.context() as patch:
        forget_wandb(patch)
        patch.setattr("memfold.logging.wandb_run._clone", lambda: str(clone))
        yield clone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """One epoch, then another one: a run that was resumed."""
    folder = tmp_path_factory.mktemp("first sweep") / "3"
    overrides = (
        "compression=stable_rps",
        "ratio=0.05",
        "compression.gradient_scale=projection",
        "artifact.bits=8",
        "seed=2",
        "logger.group=first sweep",
        "logger.tags=[mine,digits]",
        "logger.log_artifact=true",
    )
    for more in (("trainer.max_epochs=1",), ("trainer.max_epochs=2", f"resume='{folder}'")):
        run(compose_job(folder, *OFFLINE, *overrides, *more))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[OfflineRun]:
    return offline_runs(folder)


@pytest.fixture(scope="module")
def last(runs: list[OfflineRun]) -> OfflineRun:
    return runs[-1]


def test_names_tags_and_group(runs: list[OfflineRun]) -> None:
    assert len(runs) == 2
    for one in runs:
        assert one.run.display_name == "mlp-stable_rps-projection-0.05-8bit-s2"
        assert one.run.run_group == "first sweep"
        assert one.run.job_type == "train"
        assert list(one.run.tags) == ["stable_rps", "mlp", "digits", "mine"]
        assert one.run.project == "memfold"
        assert one.exit_code == 0
    assert runs[0].run.run_id == runs[1].run.run_id


def test_configuration_is_flat_and_says_what_came_out(folder: Path, last: OfflineRun) -> None:
    config, result = last.config, read_result(folder)
    memory = result["memory"]
    assert isinstance(memory, dict)
    expected = {
        "strategy": "stable_rps",
        "method": "stable_rps (gradient_scale=projection)",
        "setting": "digits-mlp-stable_rps-projection-0.05-8bit",
        "requested_ratio": 0.05,
        "budget_bytes": None,
        "bits": 8,
        "backbone": "mlp",
        "data": "digits",
        "task": "classification",
        "optimizer": "sgd",
        "scheduler": "cosine",
        "compression.gradient_scale": "projection",
        "optimizer.lr": 0.1,
        "seed": 2,
        "data.batch_size": 64,
        "trainer.max_epochs": 2,
        "stored_bytes": memory["stored_bytes"],
        "stored_ratio": memory["stored_ratio"],
        "dense_bytes": memory["dense_bytes"],
        "environment.git_commit": describe_environment()["git_commit"],
    }
    assert {key: config.get(key, "missing") for key in expected} == expected
    assert config["ratio"] == pytest.approx(0.05, rel=1e-3)
    nested = [k for k, value in config.items() if isinstance(value, dict) and k != "_wandb"]
    assert nested == []
    text = json.dumps({key: value for key, value in config.items() if key != "_wandb"})
    assert "_target_" not in text
    assert str(folder.parent) not in text  # no places on this machine


def test_every_metric_has_the_optimizer_step_as_its_axis(runs: list[OfflineRun]) -> None:
    for one in runs:
        assert one.axes["*"] == STEP
        assert all(STEP in row for row in one.history)


def test_curves_are_those_of_the_metrics_file(folder: Path, runs: list[OfflineRun]) -> None:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc"]]
    in_file = {int(row["step"]): float(row["val/acc"]) for row in rows}
    shown = {row[STEP]: row["val/acc"] for one in runs for row in one.history if "val/acc" in row}
    assert len(in_file) == 2
    assert shown == pytest.approx(in_file)
    steps = [row[STEP] for one in runs for row in one.history if "train/loss" in row]
    assert steps == [19, 39]  # the resumed run goes on where the first one ended


def test_summary_holds_the_final_values(folder: Path, last: OfflineRun) -> None:
    result = json.loads((folder / "result.json").read_text())
    for group in ("memory", "time", "parameters", "training", "compute"):
        for key, value in result[group].items():
            assert last.summary[f"{group}/{key}"] == pytest.approx(value)
    for key, value in result["metrics"].items():
        assert last.summary[key] == pytest.approx(value)
    assert {"val/best_acc", "test/acc", "packed/test/acc"} <= last.summary.keys()
    assert last.summary["accuracy"] == last.summary["packed/test/acc"]  # of what is stored


def test_artifact_is_logged_once_at_the_end(folder: Path, last: OfflineRun) -> None:
    [artifact] = last.artifacts
    assert (artifact.type, artifact.name) == ("model", "mlp-stable_rps-projection-0.05-8bit-s2")
    [content] = artifact.manifest.contents
    data = (folder / "model.safetensors").read_bytes()
    assert content.path == "model.safetensors"
    assert content.digest == b64encode(hashlib.md5(data).digest()).decode()
    assert Path(content.local_path).samefile(folder / "model.safetensors")  # no second copy
    metadata = json.loads(artifact.metadata)
    assert metadata["stored_bytes"] == last.config["stored_bytes"]
    assert (metadata["name"], metadata["bits"]) == ("stable_rps", 8)


def test_rounds_continue_the_axis_and_the_last_one_is_described(
    repository: Path, tmp_path: Path
) -> None:
    overrides = ("compression=ltr", "ratio=0.5", "compression.fraction=0.5", "compression.rounds=2")
    more = ("trainer.max_epochs=1", "logger.save_code=false")
    result = run(compose_job(tmp_path, *OFFLINE, *overrides, *more))
    [one] = offline_runs(tmp_path)
    assert one.run.display_name == "mlp-ltr-fraction=0.5-rounds=2-0.5-s1"
    steps = [row[STEP] for row in one.history if "train/loss" in row]
    assert steps == [19, 39 - result["rounds"][1]["first_step"]]
    assert one.config["ratio"] == pytest.approx(0.5, rel=1e-3)  # it began dense
    assert one.config["stored_bytes"] == result["memory"]["stored_bytes"]
    assert one.summary["training/rounds"] == 2
    assert one.artifacts == []  # not asked for
    assert not one.file("diff.patch").exists()


def test_code_state_is_the_commit_and_what_was_changed(
    repository: Path, runs: list[OfflineRun]
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True)
    for one in runs:
        assert one.run.git.commit == head.stdout.decode().strip()
        patch = one.file("diff.patch").read_text()
        assert "+new = 2" in patch
        assert "password" not in patch


# wandb leaves the file of the agent open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_agent_of_a_sweep_and_the_users_variables_come_first(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = tmp_path / "parameters.yaml"
    given.write_text("wandb_version: 1\nratio:\n  desc: null\n  value: 0.1\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "first")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(given))
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    wandb.teardown()
    run(compose_job(tmp_path, *OFFLINE, "compression=small", "ratio=0.1", "debug=fast"))
    [one] = offline_runs(tmp_path)
    assert (one.run.sweep_id, one.run.job_type) == ("first", "sweep")
    assert one.config["ratio"] == 0.1
    assert one.config["strategy"] == "small"
    assert one.summary["ratio"] != 0.1  # as it came out: widths are whole numbers
    assert "locked" not in "".join(capsys.readouterr())
    assert not one.file("diff.patch").exists()
    monkeypatch.undo()
    wandb.teardown()


def test_a_teacher_is_described_without_its_place(
    repository: Path, folder: Path, tmp_path: Path
) -> None:
    more = ("compression=dense", f"distill.teacher='{folder}'", "debug=fast", "logger=wandb")
    run(compose_job(tmp_path, *OFFLINE, *more))
    [one] = offline_runs(tmp_path)
    teacher = {k: value for k, value in one.config.items() if k.startswith("distill.teacher")}
    assert teacher == {
        "distill.teacher.backbone": "mlp",
        "distill.teacher.strategy": "stable_rps",
        "distill.teacher.ratio": pytest.approx(0.05, rel=1e-3),
        "distill.teacher.seed": 2,
    }
    assert one.config["distill.weight"] == 0.9
    text = json.dumps({key: value for key, value in one.config.items() if key != "_wandb"})
    assert str(folder.parent) not in text


def test_tags_must_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logger\.tags must be a list such as \[first,second\]"):
        run(compose_job(tmp_path, *OFFLINE, "logger.tags=first"))
