"""A run that is killed, whenever, and resumed ends as the uninterrupted one, bit for bit."""

import json
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.jobs_in_processes import output_of, run_job
from training.run_contents import SENSITIVE, STRATEGIES, differences, epoch_rows

SAVE = "+callbacks.killer._target_=training.signals.KillWhileSaving"
SIGNAL = "+callbacks.killer._target_=training.signals.SignalAt"
KILL_HERE = "+callbacks.killer.signal=SIGKILL"
ASYNCHRONOUS = "checkpoint.asynchronous=true"

WholeRun = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Uninterrupted runs, each made when it is asked for."""
    folders: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy)
            status = run_job(folders[strategy], *SENSITIVE, *STRATEGIES[strategy])
            assert status == 0, output_of(folders[strategy])
        return folders[strategy]

    return make


def saving(file: str, moment: str, number: int = 2) -> tuple[str, ...]:
    options = {"file": file, "moment": moment, "number": number}
    return (SAVE, *(f"+callbacks.killer.{key}={value}" for key, value in options.items()))


def hook(name: str, number: int, round: int = 0) -> tuple[str, ...]:
    options = {"hook": name, "number": number, "round": round}
    return (SIGNAL, KILL_HERE, *(f"+callbacks.killer.{k}={v}" for k, v in options.items()))


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("strategy", "moments"),
    [
        # One run is killed at each moment in turn, and resumed from where that left it.
        (
            "dense",
            (
                (*saving("last.ckpt", "write"), ASYNCHRONOUS),
                saving("last.ckpt", "open"),  # the best one of that epoch is there
                (*saving("best.ckpt", "write", number=1), ASYNCHRONOUS),
                saving("last.ckpt", "renamed", number=1),  # before the epoch's row is logged
            ),
        ),
        pytest.param(
            "stable_rps",
            (
                saving("best.ckpt", "sync"),
                (*saving("last.ckpt", "renamed", number=1), ASYNCHRONOUS),
                (*hook("on_validation_batch_end", 3), ASYNCHRONOUS),
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "rigl",
            (hook("on_train_batch_end", 25), saving("last.ckpt", "sync", number=1)),
            marks=pytest.mark.slow,
        ),
        (
            "ltr",
            (
                saving("rewind.ckpt", "write", number=1),
                (*saving("next.ckpt", "write", number=1), ASYNCHRONOUS),
                hook("on_train_batch_end", 12, round=1),
                saving("next.ckpt", "renamed", number=1),
            ),
        ),
    ],
)
def test_killed_and_resumed_run_is_the_uninterrupted_one(
    whole: WholeRun, tmp_path: Path, strategy: str, moments: tuple[tuple[str, ...], ...]
) -> None:
    folder = tmp_path / "run"
    job = (*SENSITIVE, *STRATEGIES[strategy])
    resume: tuple[str, ...] = ()
    for moment in moments:
        assert run_job(folder, *job, *moment, *resume) == -signal.SIGKILL, moment
        checkpoints = (folder / "checkpoints").glob("*.ckpt")
        assert all(torch.load(path, weights_only=True)["state_dict"] for path in checkpoints)
        resume = (f"resume={folder}",)
    assert run_job(folder, *job, *resume) == 0, output_of(folder)
    assert not differences(folder, whole(strategy))
    assert any("train/loss" in row for row in epoch_rows(folder))


@pytest.mark.ddp
@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_damages_nothing_and_the_run_goes_on_later(
    whole: WholeRun, tmp_path: Path, asynchronous: bool
) -> None:
    folder = tmp_path / "run"
    job = (*SENSITIVE, *STRATEGIES["dense"], f"checkpoint.asynchronous={asynchronous}")
    full = ("+callbacks.disk._target_=training.signals.FullDisk", "+callbacks.disk.epoch=1")
    assert run_job(folder, *job, *full) == 1
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    message = rf"cannot write {folder}/checkpoints/(best|last)\.ckpt: File too large"
    assert re.fullmatch(message, result["error"])
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    # The disk may be full before an asynchronous save of the first epoch has come to its end.
    assert saved == {"best.ckpt", "last.ckpt"} or (
        asynchronous and saved < {"best.ckpt", "last.ckpt"}
    )
    for path in (folder / "checkpoints").iterdir():
        assert torch.load(path, weights_only=True)["epoch"] == 0
    assert run_job(folder, *job, f"resume={folder}") == 0, output_of(folder)
    assert not differences(folder, whole("dense"))


@pytest.mark.ddp
def test_a_folder_that_cannot_be_written_is_one_line_and_stays_as_it_is(whole: WholeRun) -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(shutil.copytree(whole("dense"), Path(parent) / "run"))
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        job = (*SENSITIVE, *STRATEGIES["dense"], "trainer.max_epochs=5", f"resume={folder}")
        output = Path(parent) / "run.txt"
        output.write_text("")
        output.chmod(0o666)
        assert run_job(folder, *job, as_nobody=True) == 1
        message = f"memfold.errors.InputError: cannot write {folder}/.lock: Permission denied"
        assert output.read_text().splitlines()[-1] == message
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


@pytest.mark.ddp
def test_a_file_in_place_of_the_checkpoints_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("mine")
    assert run_job(folder, *SENSITIVE, *STRATEGIES["dense"]) == 1
    error = json.loads((folder / "result.json").read_text())["error"]
    assert error.startswith(f"cannot write {folder}/checkpoints/best.ckpt: ")
    assert (folder / "checkpoints").read_text() == "mine"
