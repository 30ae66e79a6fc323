"""Resuming: the command line and the checkpoint."""

import copy
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memfold.errors import InputError
from memfold.overrides import quote_value
from memfold.runs.resume import expand_arguments
from memfold.training.checkpoint_reading import read_checkpoint


def run_folder(folder: Path, *overrides: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return folder


def values(arguments: list[str]) -> dict[str, object]:
    overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a])
    return {override.key_or_group: override.value() for override in overrides}


def test_other_command_lines_keep_their_arguments() -> None:
    arguments = ["-m", "backbone=mlp", "ratio=0.1,0.2", "~callbacks.progress_bar"]
    assert expand_arguments(arguments) == arguments
    assert expand_arguments(["ratio=0.1", "resume=null"]) == ["ratio=0.1", "resume=null"]


def test_flags_may_stand_between_overrides() -> None:
    assert expand_arguments(["ratio=1", "--cfg", "job", "seed=2"]) == [
        "--cfg",
        "job",
        "ratio=1",
        "seed=2",
    ]


@pytest.mark.parametrize("name", ["run", "a b=c", "it's, [odd]", "tail\\", "$x ${now:%Y}"])
def test_original_overrides_come_back_unless_given_anew(tmp_path: Path, name: str) -> None:
    folder = run_folder(
        tmp_path / name, "backbone=mlp", "ratio=0.5", "+x.y=1", "trainer.max_epochs=3"
    )
    given_anew = [f"resume={quote_value(str(folder))}", "trainer.max_epochs=9", "x.y=2"]
    expanded = expand_arguments(given_anew)
    assert expanded[:3] == ["backbone=mlp", "ratio=0.5", "+x.y=1"]
    assert expanded[3:6] == given_anew
    found = values(expanded)
    assert found["trainer.max_epochs"] == 9
    assert found["hydra.output_subdir"] is None
    assert str(found["hydra.run.dir"]).replace("\\$", "$") == str(folder)


def test_expanding_twice_is_expanding_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a b", "backbone=mlp", "seed=3", "resume=old")
    once = expand_arguments([f"resume='{folder}'", "seed=4"])
    assert expand_arguments(once) == once
    # What Lightning's launcher adds for a child.
    extra = [f'hydra.run.dir="{folder}"', "hydra.job.name=child", "hydra.output_subdir=null"]
    child = expand_arguments([*once, *extra])
    assert values(child) == {**values(once), "hydra.job.name": "child"}


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda t: "$" not in t))
def test_quoted_text_is_read_as_it_is(text: str) -> None:
    override = OverridesParser.create().parse_override(f"key={quote_value(text)}")
    assert override.value() == text


def test_resume_needs_one_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        expand_arguments([f"resume={tmp_path}/missing"])
    with pytest.raises(InputError, match="is no run folder"):
        expand_arguments([f"resume={tmp_path}"])
    folder = run_folder(tmp_path / "run", "seed=1")
    with pytest.raises(InputError, match="without -m"):
        expand_arguments([f"resume={folder}", "-m"])
    with pytest.raises(InputError, match="without -m"):
        expand_arguments([f"resume={folder},{folder}"])
    with pytest.raises(InputError, match=r"hydra\.run\.dir="):
        expand_arguments([f"resume={folder}", f"hydra.run.dir={tmp_path}"])
    (folder / ".hydra" / "overrides.yaml").write_text("{a: [")
    with pytest.raises(InputError, match="cannot be read"):
        expand_arguments([f"resume={folder}"])


@pytest.mark.parametrize("group", ["optimizer", "callbacks"])
def test_group_cannot_be_null(group: str) -> None:
    with pytest.raises(InputError, match=f"^{group}=null: one of the choices"):
        expand_arguments([f"{group}=null"])
    assert expand_arguments(["experiment=null"]) == ["experiment=null"]


def whole_checkpoint() -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    state = nn.Linear(40, 30).state_dict()
    torch.save({"state_dict": state, "global_step": 12, "epoch": 3}, file)
    return file.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    path.write_bytes(whole_checkpoint())
    return path


def test_checkpoint_tells_how_far_it_is(checkpoint: Path) -> None:
    start = read_checkpoint(checkpoint, nn.Linear(40, 30).state_dict())
    assert (start.checkpoint, start.step, start.num_epochs) == (checkpoint, 12, 4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(checkpoint: Path, share: float) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"^resume: .*last\.ckpt is truncated"):
        read_checkpoint(checkpoint, nn.Linear(40, 30).state_dict())


def test_corrupt_checkpoint_is_refused(checkpoint: Path) -> None:
    contents = bytearray(checkpoint.read_bytes())
    middle = len(contents) // 2
    for position in range(middle, middle + 64):
        contents[position] ^= 0xFF
    checkpoint.write_bytes(contents)
    with pytest.raises(InputError, match=r"last\.ckpt is truncated, damaged"):
        read_checkpoint(checkpoint, nn.Linear(40, 30).state_dict())


@pytest.mark.parametrize("position", range(0, 5000, 250))
def test_one_changed_byte_is_found_or_harmless(checkpoint: Path, position: int) -> None:
    """Zip headers hold bytes without meaning; weights have none."""
    contents = bytearray(checkpoint.read_bytes())
    contents[position] ^= 0xFF
    checkpoint.write_bytes(contents)
    expected = torch.load(io.BytesIO(whole_checkpoint()), weights_only=True)["state_dict"]
    try:
        read_checkpoint(checkpoint, expected)
    except InputError:
        return
    found = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pickled_objects_are_refused(checkpoint: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 1, "epoch": 1, "x": nn.Linear(2, 2)}, checkpoint)
    with pytest.raises(InputError, match="pickled Python objects"):
        read_checkpoint(checkpoint, {})


def test_plain_pickle_is_called_one(checkpoint: Path) -> None:
    checkpoint.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(InputError, match="pickled Python objects"):
        read_checkpoint(checkpoint, {})


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "no checkpoint of a training run"),
        ({"state_dict": {}}, "no checkpoint of a training run"),
    ],
)
def test_other_files_are_refused(checkpoint: Path, contents: object, message: str) -> None:
    torch.save(contents, checkpoint)
    with pytest.raises(InputError, match=message):
        read_checkpoint(checkpoint, {})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(40, 31), r"weight has shape \(30, 40\), this model needs \(31, 40\)"),
        (nn.Linear(40, 30, bias=False), "additional tensor bias"),
        (nn.Sequential(nn.Linear(40, 30)), r"lacks tensor 0\.bias"),
    ],
)
def test_checkpoint_of_another_model_is_refused(
    checkpoint: Path, model: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_checkpoint(checkpoint, model.state_dict())


def trained() -> dict[str, Any]:
    """What training leaves, as far as it is looked at."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    counted = {"total": {"ready": 1, "completed": 1}, "current": {"ready": 1, "completed": 1}}
    names = ("automatic_optimization.optim_progress", "batch_progress", "scheduler_progress")
    fit = {"epoch_progress": counted, **{f"epoch_loop.{name}": counted for name in names}}
    return {
        "state_dict": model.state_dict(),
        "global_step": 1,
        "epoch": 0,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 1}],
        "callbacks": {"EpochMetrics": {}},
        "loops": {"fit_loop": {**fit, "state_dict": {}}},
        "round": {"number": 0, "max_epochs": None},
    }


MISSING: dict[str, Callable[[dict[str, Any]], object]] = {
    "optimizer_states": lambda c: c.pop("optimizer_states"),
    "optimizer_states ": lambda c: c["optimizer_states"].clear(),
    "optimizer_states  ": lambda c: c["optimizer_states"][0]["state"].clear(),
    "optimizer_states   ": lambda c: c["optimizer_states"][0].update(param_groups=3),
    "lr_schedulers": lambda c: c.pop("lr_schedulers"),
    "lr_schedulers ": lambda c: c["lr_schedulers"].clear(),
    "callbacks": lambda c: c.update(callbacks=[1]),
    "loops": lambda c: c.pop("loops"),
    "loops ": lambda c: c["loops"]["fit_loop"].clear(),
    "loops  ": lambda c: c["loops"]["fit_loop"].pop("epoch_loop.batch_progress"),
    "loops   ": lambda c: c["loops"]["fit_loop"].update({"epoch_progress": {"total": "many"}}),
    "loops    ": lambda c: c["loops"]["fit_loop"].update(state_dict={"combined_loader": [3]}),
}
WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "state_dict": lambda c: c.update(state_dict=[1, 2]),
    "state_dict ": lambda c: c["state_dict"].update(weight=3),
    "global_step": lambda c: c.update(global_step="many"),
    "global_step ": lambda c: c.update(global_step=True),
    "epoch": lambda c: c.update(epoch=-5),
    "teacher": lambda c: c.update(teacher=5),
    "round": lambda c: c.update(round=[1]),
    "round ": lambda c: c.update(round={"number": "x"}),
}


def test_a_whole_checkpoint_is_resumed(checkpoint: Path) -> None:
    torch.save(trained(), checkpoint)
    start = read_checkpoint(checkpoint, nn.Linear(3, 2).state_dict(), resumes=True)
    assert (start.step, start.num_epochs) == (1, 1)


@pytest.mark.parametrize("name", sorted(MISSING | WRONG))
def test_a_checkpoint_with_a_part_missing_or_of_another_kind_is_refused(
    checkpoint: Path, name: str
) -> None:
    contents = copy.deepcopy(trained())
    (MISSING | WRONG)[name](contents)
    torch.save(contents, checkpoint)
    expected = nn.Linear(3, 2).state_dict()
    with pytest.raises(InputError, match=rf"its {name.strip()} is incomplete or not") as error:
        read_checkpoint(checkpoint, expected, resumes=True)
    assert "\n" not in str(error.value)
    if name in MISSING and not name.startswith("loops    "):
        read_checkpoint(checkpoint, expected)  # for its weights alone


def test_a_pipe_in_place_of_a_checkpoint_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt is truncated, damaged or no checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt", {})


def test_a_compressed_archive_is_not_unpacked(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(InputError, match=r"last\.ckpt is truncated, damaged or no checkpoint"):
        read_checkpoint(checkpoint, {})
