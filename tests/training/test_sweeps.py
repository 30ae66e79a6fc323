"""Sweeps: progress, records and how they are resumed; a small program stands in for the jobs."""

import json
from pathlib import Path

import pytest

from memfold.errors import InputError
from memfold.training.sweeps.arguments import expand_sweep_arguments
from memfold.training.sweeps.folder import Plan
from training.sweeps import STAND_IN, finish, let, seen, start_sweep, statuses, sweep, wait_until

JOBS = ("compression=snip", "seed=1,2,3,4")


@pytest.mark.ddp
def test_failures_are_recorded_and_resumed(tmp_path: Path) -> None:
    """Jobs that fail, or are killed, take no other with them; only they are run again."""
    folder = tmp_path / "sweep"
    let(folder, 1, "fail")
    let(folder, 2, "kill")
    status, out, err = sweep(folder, *JOBS)
    assert status == 1
    assert err == (
        f"error: 2 of 4 jobs failed; run them again with: python {STAND_IN} "
        f"-m sweep.resume={folder}\n"
    )
    lines = out.splitlines()
    assert lines[0] == (
        f"4 jobs in {folder}, one after the other; what each prints is in <job>/console.log"
    )
    assert lines[1].startswith("[1/4] 0: seed=1: completed, test/acc 0.9123, 23,672 bytes, ")
    assert lines[2] == "[2/4] 1: seed=2: failed: as it was told"
    assert lines[3] == "[3/4] 2: seed=3: failed: the job's process was killed by SIGKILL"
    assert lines[4].startswith("[4/4] 3: seed=4: completed, ")
    assert "4 jobs in" in lines[5]
    assert out.count("failed    │") == 2
    assert "HYDRA" not in out
    assert "hello" not in out
    assert (folder / "0" / "console.log").read_text() == "hello from the job\n"
    assert not (folder / "0" / ".hydra").exists()  # the job's own process writes it
    plan = json.loads((folder / "sweep.json").read_text())
    assert plan["jobs"] == [["compression=snip", f"seed={seed}"] for seed in (1, 2, 3, 4)]

    let(folder, 1, "")
    let(folder, 2, "")
    (folder / "2" / "checkpoints").mkdir()
    (folder / "2" / "checkpoints" / "last.ckpt").touch()
    status, out, err = sweep(folder, f"sweep.resume={folder}")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1:3] == [
        "[1/4] 0: seed=1: already completed",
        "[2/4] 3: seed=4: already completed",
    ]
    assert lines[3].startswith("[3/4] 1: seed=2: completed")
    assert [len(seen(folder, job)) for job in range(4)] == [1, 2, 2, 1]
    assert f"resume='{folder}/2'" in seen(folder, 2)[1]["argv"]
    assert not any("resume" in text for text in seen(folder, 1)[1]["argv"])
    assert seen(folder, 1)[0]["argv"] == seen(folder, 1)[1]["argv"]


@pytest.mark.ddp
def test_folder_of_a_running_sweep_is_refused(tmp_path: Path) -> None:
    let(tmp_path, 0, "sleep")
    running = start_sweep(tmp_path, "seed=1")
    try:
        wait_until((tmp_path / "0" / "sleeps").exists)
        status, out, err = sweep(tmp_path, f"sweep.resume={tmp_path}")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {tmp_path} is in use by another process")
        assert err.count("\n") == 1
    finally:
        running.terminate()
        assert finish(running)[0] == 143
    assert statuses(tmp_path) == {"0": "failed"}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    arguments = ["-m", "seed=1,2", "ratio=0.1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    Plan("python train.py", arguments, [["seed=1"], ["seed=2"]], attempt=1).write(tmp_path)
    return tmp_path


def expand(folder: Path, *arguments: str) -> list[str]:
    own = [f"hydra.sweep.dir='{folder}'", "hydra.callbacks.sweep.resume=true"]
    expanded = expand_sweep_arguments(["-m", *arguments, f"sweep.resume={folder}"])
    assert expanded[-2:] == own
    return expanded[:-2]


def test_resumed_sweep_has_the_recorded_overrides(recorded: Path) -> None:
    experiment = ["-m", "seed=1,2", "ratio=0.1"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    assert expand(recorded) == [*experiment, *joblib]
    assert expand(recorded, "ratio=0.1", "seed=1,2") == experiment
    other = ["hydra/launcher=submitit_local"]
    assert expand(recorded, *other) == [*experiment, *other]
    assert expand(recorded, "seed=1,2", "ratio=0.1", *other) == [*experiment, *other]
    assert expand(recorded, "hydra.verbose=true") == [*experiment, *joblib, "hydra.verbose=true"]
    assert expand(recorded, f"hydra.sweep.dir={recorded}") == [*experiment, *joblib]
    assert expand_sweep_arguments(["-m", "seed=1", "sweep.resume=null"]) == ["-m", "seed=1"]
    assert expand_sweep_arguments(["-m", "seed=1,2"]) == ["-m", "seed=1,2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "seed=1,2"], "that sweep has ratio 0.1, but it is left out now"),
        (["-m", "seed=1,3", "ratio=0.1"], "that sweep has seed 1,2, but 1,3 is given now"),
        (["-m", "seed=1,2", "ratio=0.1", "+x=1"], "that sweep was started without +x, but 1 is"),
        (["-m", "hydra.sweep.subdir=x"], "that sweep has seed 1,2, but it is left out"),
        (["-m", "--config-name", "other"], "started without flags, but --config-name other"),
        (["-m", "hydra.sweep.dir=elsewhere"], "hydra.sweep.dir=elsewhere is another"),
        ([], "continues a sweep: python train.py -m sweep.resume=FOLDER"),
    ],
)
def test_other_sweep_is_refused(recorded: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        expand_sweep_arguments([*arguments, f"sweep.resume={recorded}"])
    assert message in str(error.value)


def test_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of a sweep"):
        expand_sweep_arguments(["-m", f"sweep.resume={tmp_path}"])
