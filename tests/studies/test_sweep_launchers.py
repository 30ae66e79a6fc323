"""Several jobs at once: slots of this machine, submitit; a small program stands in for the jobs."""

import os
import signal
from pathlib import Path

import pytest
from omegaconf import DictConfig

from memfold.studies.runner import share_out, variables_for
from studies.sweeps import (
    finish,
    let,
    processes_of,
    seen,
    start_sweep,
    statuses,
    sweep,
    wait_until,
)

SLOTS = ("hydra.launcher.n_jobs=2",)
SUBMITIT = ("hydra/launcher=submitit_local",)


@pytest.mark.ddp
def test_threads_and_gpus_are_shared_out(tmp_path: Path) -> None:
    let(tmp_path, 0, "nap")
    let(tmp_path, 1, "nap")
    let(tmp_path, 2, "kill")
    devices = {"CUDA_VISIBLE_DEVICES": "4,7"}
    status, out, err = sweep(tmp_path, "seed=1,2,3,4", *SLOTS, **devices)
    assert status == 1
    assert err.startswith("error: 1 of 4 jobs failed; ")
    assert err.count("\n") == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"4 jobs in {tmp_path}, 2 at once; ")
    assert sorted(line[:5] for line in lines[1:5]) == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    expected = ["completed", "completed", "failed", "completed"]
    assert list(statuses(tmp_path).values()) == expected
    jobs = [seen(tmp_path, job)[0] for job in range(4)]
    num_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {job["OMP_NUM_THREADS"] for job in jobs} == {str(num_threads)}
    assert sorted(job["CUDA_VISIBLE_DEVICES"] for job in jobs[:2]) == ["4", "7"]
    assert {job["CUDA_VISIBLE_DEVICES"] for job in jobs} == {"4", "7"}


@pytest.mark.ddp
@pytest.mark.slow
def test_the_users_threads_are_left_alone(tmp_path: Path) -> None:
    status, _, err = sweep(tmp_path, "seed=1,2", *SLOTS, OMP_NUM_THREADS="3")
    assert (status, err) == (0, "")
    assert {seen(tmp_path, job)[0]["OMP_NUM_THREADS"] for job in (0, 1)} == {"3"}


def gpus(trainer: dict[str, object], num_jobs: int, visible: str) -> list[str | None]:
    """Return what each of several jobs at once sees."""
    slots = share_out(num_jobs, {"CUDA_VISIBLE_DEVICES": visible})
    job = DictConfig({"trainer": trainer})
    return [variables_for(job, slot).get("CUDA_VISIBLE_DEVICES") for slot in slots]


def test_gpus_get_equally_many_jobs() -> None:
    one: dict[str, object] = {"devices": 1, "accelerator": "auto"}
    assert gpus(one, 5, "GPU-a, GPU-b") == ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-a"]
    two: dict[str, object] = {"devices": 2, "accelerator": "auto"}
    assert gpus(two, 2, "0,1,2,3") == ["0,2", "1,3"]


@pytest.mark.parametrize(
    ("trainer", "num_jobs", "visible"),
    [
        ({"devices": 1, "accelerator": "cpu"}, 2, "0,1"),
        ({"devices": 2, "accelerator": "gpu"}, 2, "0,1"),
        ({"devices": [1], "accelerator": "gpu"}, 2, "0,1"),
        ({"devices": 1, "accelerator": "gpu"}, 1, "0,1"),
        ({"devices": 1, "accelerator": "gpu"}, 2, "0"),
        ({"devices": 1, "accelerator": "gpu"}, 2, ""),
    ],
)
def test_other_jobs_see_all_gpus(trainer: dict[str, object], num_jobs: int, visible: str) -> None:
    assert gpus(trainer, num_jobs, visible) == [None] * num_jobs


@pytest.mark.slow
@pytest.mark.ddp
def test_dead_submitit_task_leaves_the_other_jobs_alone(tmp_path: Path) -> None:
    let(tmp_path, 0, "kill parent")
    let(tmp_path, 1, "nap")
    status, out, err = sweep(tmp_path, "seed=1,2", *SUBMITIT)
    assert status == 1
    assert statuses(tmp_path) == {"0": "failed", "1": "completed"}
    assert "1: seed=2: completed" in out
    assert "failed    │" in out
    lines = err.splitlines()
    assert lines[0].startswith("error: Job ")
    assert lines[1].startswith("error: 1 of 2 jobs failed; ")
    assert len(lines) == 2
    job = seen(tmp_path, 1)[0]
    assert (job["SUBMITIT_EXECUTOR"], job["SLURM_NTASKS"]) == (None, None)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"0", "1", ".submitit", ".sweep"}
    wait_until(lambda: not processes_of(tmp_path), seconds=30)


@pytest.mark.ddp
@pytest.mark.slow
def test_a_sweep_that_its_job_kills_is_gone_on_with(tmp_path: Path) -> None:
    let(tmp_path, 0, "kill parent")
    let(tmp_path, 1, "sleep")
    assert sweep(tmp_path, "seed=1,2,3,4", *SLOTS)[0] == -signal.SIGKILL
    wait_until(lambda: not processes_of(tmp_path), seconds=30)
    let(tmp_path, 0, "")
    let(tmp_path, 1, "")
    status, _, err = sweep(tmp_path, f"sweep.resume={tmp_path}")
    assert (status, err) == (0, "")
    assert set(statuses(tmp_path).values()) == {"completed"}
    status, _, err = sweep(tmp_path, "seed=1,2,3,4")
    assert status == 1
    assert err.startswith(f"error: hydra.sweep.dir={tmp_path} holds a sweep; ")


@pytest.mark.ddp
@pytest.mark.slow
def test_requeued_task_goes_on_with_its_run(tmp_path: Path) -> None:
    """SIGUSR2 is how submitit learns that a job's time is over."""
    let(tmp_path, 0, "sleep")
    running = start_sweep(tmp_path, "seed=1", *SUBMITIT)
    wait_until((tmp_path / "0" / "sleeps").exists)
    let(tmp_path, 0, "")
    [task] = [
        process
        for process in processes_of(tmp_path)
        if "submitit.core._submit" in process.info["cmdline"]
    ]
    task.send_signal(signal.SIGUSR2)
    status, out, err = finish(running)
    assert (status, err) == (0, "")
    assert out.count("[1/1] 0: completed") == 1
    first, second = seen(tmp_path, 0)
    assert not any(text.startswith("resume=") for text in first["argv"])
    assert f"resume='{tmp_path}/0'" in second["argv"]


@pytest.mark.ddp
@pytest.mark.slow
def test_several_local_tasks_per_job_are_refused(tmp_path: Path) -> None:
    status, out, err = sweep(tmp_path, "seed=1", *SUBMITIT, "hydra.launcher.tasks_per_node=2")
    assert (status, out) == (1, "")
    assert err.startswith("error: hydra.launcher.tasks_per_node=2: submitit_local starts one ")
    assert err.count("\n") == 1
