"""Sweeps of trainings, as users start them."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from studies.sweeps import finish, processes_of, statuses, wait_until
from training.jobs import SMALL, start_training, train
from training.wandb_files import offline_runs

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

TWO_RANKS = (
    *(text for text in SMALL if not text.startswith(("backbone", "trainer"))),
    "backbone=custom",
    "backbone.target=training.networks.DropoutNet",
    "trainer=ddp_cpu",
    "trainer.max_epochs=12",
)
LEARNING_RATES = ("0.1", "0.2")
BASIC: tuple[str, ...] = ()
SLOTS = ("hydra.launcher.n_jobs=2",)
SUBMITIT = ("hydra/launcher=submitit_local",)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


def assert_same_run(folder: Path, plain: Path) -> None:
    found, expected = weights(folder), weights(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = [json.loads((f / "result.json").read_text()) for f in (folder, plain)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["environment"]["world_size"] == 2


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of runs of two processes that belong to no sweep."""
    folders = []
    for lr in LEARNING_RATES:
        folder = tmp_path_factory.mktemp("plain")
        status, _, err = train(*TWO_RANKS, f"optimizer.lr={lr}", f"hydra.run.dir={folder}")
        assert status == 0, err
        folders.append(folder)
    return folders


@pytest.mark.parametrize("launcher", [BASIC, SLOTS, SUBMITIT], ids=["basic", "slots", "submitit"])
def test_job_of_two_processes_is_the_plain_run(
    tmp_path: Path, plain_runs: list[Path], launcher: tuple[str, ...]
) -> None:
    """Both ranks draw, shard and choose as they do without a sweep, in one folder."""
    values = ",".join(LEARNING_RATES)
    folder = tmp_path / "sweep"
    status, out, err = train(
        "-m", *TWO_RANKS, f"optimizer.lr={values}", *launcher, f"hydra.sweep.dir={folder}"
    )
    assert (status, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    jobs = {path.name for path in folder.iterdir() if path.name.isdigit()}
    assert jobs == {"0", "1"}
    for job, plain in enumerate(plain_runs):
        assert_same_run(folder / str(job), plain)
        assert f"{job}: optimizer.lr={LEARNING_RATES[job]}: completed, test/acc" in out
        assert not list((folder / str(job)).glob("*process_1*"))


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (BASIC, signal.SIGKILL),
        (BASIC, signal.SIGINT),
        (SLOTS, signal.SIGTERM),
        (SLOTS, signal.SIGKILL),
        (SUBMITIT, signal.SIGINT),
        (SUBMITIT, signal.SIGKILL),
    ],
)
def test_stopped_sweep_ends_as_if_it_had_not_been(
    tmp_path: Path, plain_runs: list[Path], launcher: tuple[str, ...], number: signal.Signals
) -> None:
    arguments = (*TWO_RANKS, f"optimizer.lr={','.join(LEARNING_RATES)}", *launcher)
    sweep = start_training("-m", *arguments, f"hydra.sweep.dir={tmp_path}")
    wait_until((tmp_path / "0" / "checkpoints" / "last.ckpt").exists, seconds=120)
    os.kill(sweep.pid, number)  # this process alone
    ended, out, _ = finish(sweep)
    if number == signal.SIGKILL:
        assert ended == -number
    else:
        assert ended == 128 + number
        assert "2 jobs in" in out
    wait_until(lambda: not processes_of(tmp_path), seconds=120 if number == signal.SIGKILL else 0.1)
    status, _, err = train("-m", *arguments, f"sweep.resume={tmp_path}")
    assert (status, err) == (0, "")
    for job, plain in enumerate(plain_runs):
        assert_same_run(tmp_path / str(job), plain)


def test_run_with_a_damaged_checkpoint_is_started_anew(tmp_path: Path) -> None:
    arguments = (*SMALL, "trainer.max_epochs=2", "seed=${hydra:job.num}", "optimizer.lr=0.1,0.2")
    status, _, err = train("-m", *arguments, f"hydra.sweep.dir={tmp_path}")
    assert (status, err) == (0, "")
    trained = [weights(tmp_path / job) for job in ("0", "1")]
    last = tmp_path / "1" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    (tmp_path / "1" / "result.json").write_text('{"status": "failed", "error": "killed"}')
    again = (*arguments, f"sweep.resume={tmp_path}")  # what refers to others must be said again
    status, out, err = train("-m", *again)
    assert (status, err) == (0, ""), out
    for job, before in enumerate(trained):
        again = weights(tmp_path / str(job))
        assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
        assert json.loads((tmp_path / str(job) / "result.json").read_text())["seed"] == job
    assert len((tmp_path / "1" / "metrics.csv").read_text().splitlines()) == len(
        (tmp_path / "0" / "metrics.csv").read_text().splitlines()
    )


def test_death_of_one_rank_does_not_end_the_sweep(tmp_path: Path) -> None:
    targets = "training.networks.DiesOnRankOne,training.networks.DropoutNet"
    status, _, err = train(
        "-m",
        *(text for text in TWO_RANKS if not text.startswith("backbone.target")),
        f"backbone.target={targets}",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert status == 1
    assert err.startswith("error: 1 of 2 jobs failed; ")
    assert statuses(tmp_path) == {"0": "failed", "1": "completed"}
    error = json.loads((tmp_path / "0" / "result.json").read_text())["error"]
    assert "another process of this run died" in error


@pytest.mark.timeout(1200)
def test_three_of_24_jobs_fail(tmp_path: Path) -> None:
    sweep = start_training(
        "-m",
        *(text for text in SMALL if not text.startswith("backbone")),
        "backbone=custom",
        "backbone.target=training.fragile.Fragile",
        "trainer.max_epochs=1",
        "seed=range(1,25)",
        *SLOTS,
        f"hydra.sweep.dir={tmp_path}",
    )
    status, out, err = finish(sweep, seconds=1100)
    assert status == 1
    assert err.startswith("error: 3 of 24 jobs failed; ")
    found = statuses(tmp_path)
    assert len(found) == 24
    assert [job for job, status in found.items() if status == "failed"] == ["11", "19", "4"]
    lines = out.splitlines()
    assert lines[0].startswith("24 jobs in ")
    assert [line.split()[0] for line in lines[1:25]] == [f"[{i}/24]" for i in range(1, 25)]
    assert sum(": completed, test/acc " in line for line in lines[1:25]) == 21
    assert out.count("│ completed │") == 21
    assert out.count("│ failed    │") == 3
    reasons = [line.partition(": failed: ")[2] for line in sorted(lines[1:25]) if "failed" in line]
    assert sorted(reasons) == [
        "RuntimeError: seed 5 cannot be trained",
        "its process ended with status 7 before it could say why",
        "its process was killed by SIGKILL",
    ]


def test_wandb_runs_have_own_names_and_one_group(tmp_path: Path) -> None:
    arguments = [text for text in SMALL if not text.startswith("logger")]
    status, out, err = train(
        "-m",
        *arguments,
        "logger=wandb",
        "logger.mode=offline",
        "trainer.max_epochs=1",
        "seed=1,2",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert (status, err) == (0, "")
    for job, seed in enumerate((1, 2)):
        [one] = offline_runs(tmp_path / str(job))
        assert one.run.display_name == f"mlp-dense-s{seed}"
        assert (one.run.run_group, one.run.job_type) == (tmp_path.name, "sweep")
    [line] = [line for line in out.splitlines() if "wandb sync" in line]  # for all jobs
    assert line.endswith(f"wandb sync {tmp_path}/*/wandb/offline-run-*")
    [line] = [line for line in out.splitlines() if "scripts/report.py" in line]
    assert line.endswith(f" {tmp_path} --out {tmp_path}/report")  # the clone's path may be quoted
