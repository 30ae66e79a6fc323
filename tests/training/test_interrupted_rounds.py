"""Runs of several rounds that are interrupted end as those that are not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from memfold.errors import InputError
from memfold.runs.folder import refuse_used_folder
from memfold.tasks import TaskModule
from memfold.training.round_tracker import RoundFolder
from training.jobs import train_forked
from training.ticket_runs import (
    NAMES,
    NETWORK,
    THREE_ROUNDS,
    TICKETS,
    load,
    masks,
    metric_rows,
    round_folders,
    run_small,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three rounds."""
    folder = tmp_path_factory.mktemp("whole")
    run_small(folder, *THREE_ROUNDS)
    return folder


@pytest.mark.parametrize("has_links", [True, False])
def test_the_folder_of_a_round_is_complete_and_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr("os.link", refused)
    (tmp_path / "checkpoints").mkdir()
    contents = {"metrics.csv": "step\n1\n", "checkpoints/last.ckpt": "x", "train.log": "a line"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    rounds = RoundFolder(tmp_path)
    assert (rounds.number, rounds.start) == (0, None)
    left_over = tmp_path / "rounds" / "0.partial" / "checkpoints" / "last.ckpt"
    left_over.parent.mkdir(parents=True)
    left_over.write_text("of an attempt that was killed")
    rounds.commit({"steps": 3}, {"weights": torch.ones(2)})
    assert (rounds.number, rounds.results()) == (1, [{"steps": 3}])
    assert rounds.start is not None
    assert torch.equal(load(rounds.start)["weights"], torch.ones(2))
    rounds.clear()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("of the next round")
    folder = tmp_path / "rounds" / "0"
    assert (folder / "metrics.csv").read_text() == contents["metrics.csv"]
    assert (folder / "checkpoints" / "last.ckpt").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "metrics.csv",
        "rounds",
        "train.log",
    ]
    rounds.commit({"steps": 4}, {})
    assert [path.parent.name for path in (tmp_path / "rounds").rglob("next.ckpt")] == ["1"]
    (folder / "result.json").write_text("{")
    with pytest.raises(InputError, match=r"rounds/0/result\.json cannot be read"):
        rounds.results()


class Interruption(Exception):
    """A power cut."""


def stop_at_step(patch: pytest.MonkeyPatch, folder: Path, number: int, step: int) -> None:
    original = TaskModule.training_step

    def training_step(self: TaskModule, *arguments: Any) -> Any:
        if RoundFolder(folder).number == number and self.trainer.global_step == step:
            raise Interruption
        return original(self, *arguments)

    patch.setattr(TaskModule, "training_step", training_step)


def stop_in(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interruption

    patch.setattr(owner, name, stopped)


def stop_in_mid_clear(patch: pytest.MonkeyPatch) -> None:
    original = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "last.ckpt":
            raise Interruption
        original(self, missing_ok)

    patch.setattr(Path, "unlink", unlink)


def test_a_run_interrupted_anywhere_ends_as_the_uninterrupted_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruptions = (
        (0, lambda patch: stop_at_step(patch, tmp_path, 0, 15)),  # after the point was saved
        (0, lambda patch: stop_in(patch, Trainer, "test")),
        (0, lambda patch: stop_in(patch, Path, "rename")),  # the folder of the round is not there
        (1, lambda patch: stop_in(patch, RoundFolder, "clear")),  # it is, and so is what it holds
        (1, lambda patch: stop_at_step(patch, tmp_path, 1, 16)),  # no checkpoint of this round yet
        (1, lambda patch: stop_at_step(patch, tmp_path, 1, 25)),
        (2, stop_in_mid_clear),
        (2, lambda patch: stop_at_step(patch, tmp_path, 2, 13)),
        (2, lambda patch: stop_in(patch, Trainer, "test")),
    )
    resume: tuple[str, ...] = ()
    for number, interrupt in interruptions:
        with monkeypatch.context() as patch:
            interrupt(patch)
            with pytest.raises(Interruption):
                run_small(tmp_path, *THREE_ROUNDS, *resume)
        assert RoundFolder(tmp_path).number == number
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["status"] == "failed"
        with pytest.raises(InputError, match="holds an unfinished run"):
            refuse_used_folder(tmp_path)
        resume = (f"resume={tmp_path}",)
    result = run_small(tmp_path, *THREE_ROUNDS, *resume)
    expected = json.loads((whole / "result.json").read_text())
    assert result["training"] == expected["training"]
    assert result["status"] == "completed"
    pairs = zip(round_folders(whole), round_folders(tmp_path), strict=True)
    for number, (first, second) in enumerate(pairs):
        artifacts = [(f / "model.safetensors").read_bytes() for f in (first, second)]
        assert artifacts[0] == artifacts[1]
        assert metric_rows(first) == metric_rows(second), number
        for key in ("val/acc", "test/acc", "test/loss"):
            found, wanted = (r["rounds"][number]["metrics"][key] for r in (result, expected))
            assert found == wanted
    for folder in (whole, tmp_path):
        assert sorted(path.name for path in (folder / "rounds").iterdir()) == [
            "0",
            "1",
            "rewind.ckpt",
        ]


def test_the_length_of_rounds_cannot_change(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for epochs, message in ((3, "cannot be trained further"), (4, "is 3 in that run, not 4")):
        with pytest.raises(InputError, match=message):
            run_small(whole, *THREE_ROUNDS, f"resume={whole}", f"trainer.max_epochs={epochs}")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_repeat_a_round_in_which_they_were_killed(tmp_path: Path) -> None:
    arguments = [text for text in TICKETS if text not in ("trainer=cpu", "data.batch_size=128")]
    arguments += ["trainer=ddp_cpu", "data.batch_size=64", "compression.rewind_steps=13"]
    # Nothing leaves after the first round, in the second one of the processes is killed.
    arguments += ["ratio=0.3", "compression.fraction=0", "compression.rounds=3"]
    killer = (
        "+callbacks.killer._target_=training.networks.KillInRound",
        "+callbacks.killer.step=25",
    )
    status, _, _ = train_forked(*arguments, *killer, f"hydra.run.dir={tmp_path}")
    assert status != 0
    assert RoundFolder(tmp_path).number == 1
    named = (NETWORK[1], killer[0])
    status, _, err = train_forked(f"resume={tmp_path}", *named, "~callbacks.killer")
    assert status == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["world_size"] == 2
    assert [r["num_values"] for r in result["rounds"]] == [2368, 2368, 710]
    first, second, last = round_folders(tmp_path)
    artifacts = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert artifacts[0] == artifacts[1]
    rows = [[row[:2] + row[3:] for row in metric_rows(folder)] for folder in (first, second)]
    assert rows[0][-3:] == rows[1][-3:]
    trained = load(second / "checkpoints" / "last.ckpt")["state_dict"]
    kept = masks(load(last / "checkpoints" / "last.ckpt"))
    magnitudes = torch.cat([trained[name].abs() for name in NAMES])
    flat = torch.cat([mask.flatten() for mask in kept])
    assert magnitudes[flat].min() >= magnitudes[~flat].max()
