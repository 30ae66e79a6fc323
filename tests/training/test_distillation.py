"""Whole jobs with a teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from memfold.errors import InputError
from memfold.training import run
from training.jobs import SMALL, compose_job
from training.rank_jobs import train_in_two_ranks

STUDENT = ("compression=stable_rps", "ratio=0.02", "trainer.max_epochs=2")


def run_small(folder: Path, *overrides: str) -> dict[str, Any]:
    return run(compose_job(folder, *SMALL, *overrides))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_small(folder, "trainer.max_epochs=3", "backbone.width=64", "seed=7")
    return folder


@pytest.fixture
def teacher(trained: Path, tmp_path: Path) -> Path:
    """A copy of a completed run."""
    return Path(shutil.copytree(trained, tmp_path / "teacher"))


def test_a_run_learns_from_a_teacher_and_says_so(teacher: Path, tmp_path: Path) -> None:
    before = json.loads((teacher / "result.json").read_text())
    result = run_small(tmp_path / "run", *STUDENT, f"distill.teacher={teacher}")
    plain = run_small(tmp_path / "plain", *STUDENT)
    distill = result["distill"]
    assert distill["temperature"] == 4.0
    assert distill["weight"] == 0.9
    assert distill["teacher"]["run"] == str(teacher)
    for key in ("backbone", "compression", "metrics", "seed"):
        assert distill["teacher"][key] == before[key]
    assert plain["distill"] is None
    assert result["metrics"]["train/distill_loss"] > 0
    assert "train/distill_loss" not in plain["metrics"]
    states = [weights(tmp_path / name) for name in ("run", "plain")]
    assert states[0].keys() == states[1].keys()
    assert result["memory"]["train_state_bytes"] == plain["memory"]["train_state_bytes"]
    assert result["memory"]["stored_bytes"] == plain["memory"]["stored_bytes"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert "train/distill_loss" in file.readline()


def test_the_teacher_moves_no_initial_value(teacher: Path, tmp_path: Path) -> None:
    # With weight 0 the student trains on the labels alone, from the same start.
    options = (f"distill.teacher={teacher}", "distill.weight=0")
    run_small(tmp_path / "run", *STUDENT, *options)
    run_small(tmp_path / "plain", *STUDENT)
    states = [weights(tmp_path / name) for name in ("run", "plain")]
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name


def test_a_compressed_run_can_teach(trained: Path, tmp_path: Path) -> None:
    run_small(tmp_path / "teacher", *STUDENT)
    result = run_small(tmp_path / "run", *STUDENT, f"distill.teacher={tmp_path / 'teacher'}")
    assert result["distill"]["teacher"]["compression"]["name"] == "stable_rps"


def test_a_resumed_run_keeps_its_teacher_wherever_it_is(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_small(folder, *STUDENT, f"distill.teacher={teacher}", "trainer.max_epochs=1")
    run_small(tmp_path / "other", *STUDENT)
    with pytest.raises(InputError, match=r"other is not the teacher of that run, which had anoth"):
        run_small(folder, *STUDENT, f"distill.teacher={tmp_path / 'other'}", f"resume={folder}")
    with pytest.raises(InputError, match=r"distill.teacher=None is not .* which had another"):
        run_small(folder, *STUDENT, "distill.teacher=null", f"resume={folder}")
    options = (f"distill.teacher={teacher}", "distill.weight=0.5", f"resume={folder}")
    with pytest.raises(InputError, match=r"distill\.weight is 0\.9 in that run, not 0\.5"):
        run_small(folder, *STUDENT, *options)
    moved = teacher.rename(tmp_path / "moved")
    result = run_small(folder, *STUDENT, f"distill.teacher={moved}", f"resume={folder}")
    assert result["epochs"] == 2
    assert result["distill"]["teacher"]["run"] == str(moved)
    with pytest.raises(InputError, match=r"moved is not the teacher of that run, which had none"):
        run_small(
            tmp_path / "other",
            *STUDENT,
            "trainer.max_epochs=3",
            f"distill.teacher={moved}",
            f"resume={tmp_path / 'other'}",
        )


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / ".hydra" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        change(config)
        file.write_text(yaml.safe_dump(config))

    return edit


def _learn_numbers(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "task": "regression"}))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _fail(folder: Path) -> None:
    (folder / "result.json").write_text('{"status": "failed", "error": "interrupted"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "result.json").unlink(), "no run folder: it has no result.json"),
        (_fail, r"the run is not completed \(interrupted\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "artifact .* does not exist"),
        (_truncate, "artifact .* is truncated, damaged"),
        (
            lambda folder: (folder / ".hydra" / "config.yaml").unlink(),
            "config.yaml cannot be read: it is missing",
        ),
        (
            lambda folder: (folder / ".hydra" / "config.yaml").write_text("{a: ["),
            "config.yaml cannot be read: ",
        ),
        (
            lambda folder: (folder / ".hydra" / "config.yaml").write_text("[1, 2]"),
            "config.yaml cannot be read: ",
        ),
        (
            _edit(lambda config: config["data"].update(_target_="memfold.data.mnist.MNIST")),
            r"is a teacher of another task: its data is memfold\.data\.mnist\.MNIST, .* run memf",
        ),
        (
            _learn_numbers,
            r"is a teacher of another task: its task is regression",
        ),
        (
            _edit(lambda config: config["backbone"].update(width=32)),
            r"cannot be loaded: artifact .* is of another backbone",
        ),
        (
            _edit(lambda config: config["backbone"].update(_target_="memfold.backbones.Gone")),
            r"cannot be loaded: backbone\._target_=.*Gone is no backbone of memfold",
        ),
    ],
)
def test_a_wrong_teacher_is_one_line(
    teacher: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(teacher)
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=message) as caught:
        run_small(folder, *STUDENT, f"distill.teacher={teacher}")
    assert str(caught.value).startswith(f"distill.teacher={teacher}")
    assert "\n" not in str(caught.value)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temperature=0", r"distill\.temperature must be a number above 0, got 0"),
        ("distill.temperature=inf", r"distill\.temperature must be .* got inf"),
        ("distill.weight=1.5", r"distill\.weight must be a number in \[0, 1\], got 1\.5"),
        ("distill.weight=-0.1", r"distill\.weight must be"),
        ("distill.weight=true", r"distill\.weight must be"),
        ("distill.teacher=3", r"distill\.teacher must be a run folder or null, got 3"),
        ("distill.teacher=''", r"distill\.teacher must be a run folder or null, got ''"),
        ("distill=null", "distill must be .* got None"),
        ("+distill.alpha=1", r"distill must be teacher, .* 'alpha': 1"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_small(tmp_path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.ddp
def test_two_processes_learn_what_one_does(teacher: Path, tmp_path: Path) -> None:
    options = (*STUDENT, f"distill.teacher={teacher}")
    one = run_small(tmp_path / "one", *options, "data.batch_size=100")
    two_ranks = (*SMALL, *options, "trainer=ddp_cpu", "data.batch_size=50")
    train_in_two_ranks(tmp_path, {"two": [text for text in two_ranks if text != "trainer=cpu"]})
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["environment"]["world_size"] == 2
    assert two["distill"] == one["distill"]
    states = [weights(tmp_path / name) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        # Sums in another order, over 24 steps.
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
    key = "train/distill_loss"
    assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4)
