"""A rank that dies ends the run on all ranks, soon, and the run says that it failed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from training.jobs import SMALL, start_training
from training.launching import finish, start_torchrun

RUN = (
    *(text for text in SMALL if text != "trainer=cpu"),
    "trainer=ddp_cpu",
    "data.batch_size=100",
    "trainer.max_epochs=2",
    "+callbacks.end._target_=training.rank_probes.EndRank",
)
SECONDS = 60


def arguments(folder: Path, rank: int, place: str, how: str) -> list[str]:
    options = {"rank": rank, "place": place, "how": how, "marker": folder / "marker"}
    chosen = [f"+callbacks.end.{key}={value}" for key, value in options.items()]
    return [*RUN, *chosen, f"hydra.run.dir={folder / 'run'}"]


def assert_ends(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Check the end of a run whose rank has died; return its status and stderr."""
    status, _, err = finish(process)  # all ranks hold stderr open
    assert time.time() - (folder / "marker").stat().st_mtime < SECONDS
    assert status != 0
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"
    assert not (folder / "run" / "model.safetensors").exists() or "test" in str(process.args)
    return status, err


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("place", ["init", "setup", "fit", "test"])
@pytest.mark.parametrize(("rank", "how"), [(1, "kill"), (0, "kill"), (1, "raise"), (0, "raise")])
def test_run_fails(rank: int, how: str, place: str, tmp_path: Path) -> None:
    _, err = assert_ends(start_training(*arguments(tmp_path, rank, place, how)), tmp_path)
    if (rank, how) == (0, "kill"):
        return
    if how == "raise" and rank == 0:
        assert "RuntimeError: on purpose" in err


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("rank", "how", "place"),
    [(1, "kill", "fit"), (0, "kill", "fit"), (0, "kill", "test"), (1, "raise", "init")],
)
def test_run_under_torchrun_fails(rank: int, how: str, place: str, tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node=2")
    process = start_torchrun(tmp_path, *arguments(tmp_path, rank, place, how), options=options)
    assert_ends(process, tmp_path)


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_end_with_torchrun(tmp_path: Path) -> None:
    never = arguments(tmp_path, 9, "fit", "kill")
    options = ("--standalone", "--nproc-per-node=2")
    process = start_torchrun(tmp_path, *never, "trainer.max_epochs=100000", options=options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "marker").touch()
    os.kill(process.pid, signal.SIGKILL)
    assert_ends(process, tmp_path)
