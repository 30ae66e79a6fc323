"""scripts/train_slurm.sh with programs that stand in for those of SLURM."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.jobs import REPOSITORY, SMALL
from training.launching import clean_environment, finish, free_port, start

SCRIPT = REPOSITORY / "scripts" / "train_slurm.sh"
RUN = (
    *(text for text in SMALL if text != "trainer=cpu"),
    "trainer=ddp_cpu",
    "compression=rigl",
    "compression.update_every=5",
    "ratio=0.1",
    "trainer.max_epochs=12",
    "data.batch_size=50",
)

SRUN = """#!/usr/bin/env python
import os, pathlib, subprocess, sys
options = dict(text[2:].split("=") for text in sys.argv[1:] if text.startswith("--"))
command = [text for text in sys.argv[1:] if not text.startswith("--")]
num_tasks, num_nodes = int(options["ntasks"]), int(options["nodes"])
per_node = int(options["ntasks-per-node"])
assert num_tasks == num_nodes * per_node
tasks = []
for rank in range(num_tasks):
    variables = dict(
        SLURM_STEP_ID="0", SLURM_NTASKS=num_tasks, SLURM_NNODES=num_nodes,
        SLURM_PROCID=rank, SLURM_LOCALID=rank % per_node, SLURM_NODEID=rank // per_node,
        SLURM_NODELIST="127.0.0.1",
    )
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    tasks.append(subprocess.Popen(command, env=environment))
pathlib.Path("started").write_text(" ".join([*(str(task.pid) for task in tasks), *command]))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Return a folder to submit in, whose `bin` has stand-ins for SLURM's programs."""
    programs = {
        "srun": SRUN,
        "squeue": "#!/bin/sh\ncat state\n",
        "scontrol": '#!/bin/sh\necho "$@" >>scontrol.log\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    for name in ("train.py", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "state").write_text("RUNNING\n")
    return tmp_path


def submit(cluster: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Run the script as sbatch does: a copy, from another folder, on two nodes."""
    spool = cluster / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(SCRIPT, spool / "slurm_script")
    environment = clean_environment(
        PATH=f"{cluster / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        MASTER_PORT=str(free_port()),
        SLURM_SUBMIT_DIR=str(cluster),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="memfold",
        SLURM_JOB_NUM_NODES="2",
        **{"SLURM_GPUS_PER_NODE": "h100:1"} | variables,
    )
    return start(spool, "bash", "slurm_script", *arguments, environment=environment)


def command_of(cluster: Path) -> list[str]:
    words = (cluster / "started").read_text().split()
    return words[words.index("train.py") + 1 :]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def requeued(cluster: Path) -> bool:
    return (cluster / "scontrol.log").exists()


@pytest.mark.ddp
def test_job_with_nothing_to_run_says_why(cluster: Path) -> None:
    status, _, err = finish(submit(cluster, SLURM_GPUS_PER_NODE=""))
    assert (status, err.count("\n")) == (1, 1)
    assert "sbatch --gpus-per-node=N" in err
    (cluster / "train.py").unlink()
    status, _, err = finish(submit(cluster))
    assert status == 1
    assert "in the folder that has train.py" in err
    assert not (cluster / "started").exists()


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("leftover", "given", "expected"),
    [
        (None, (), ["trainer=ddp", "hydra.run.dir=outputs/slurm-4711"]),
        (None, ("trainer=x",), ["trainer=x", "hydra.run.dir=outputs/slurm-4711"]),
        (
            "mine/checkpoints/last.ckpt",
            ("hydra.run.dir=mine",),
            ["trainer=ddp", "hydra.run.dir=mine", "resume=mine"],
        ),
        ("outputs/slurm-4711/rounds/0", (), ["trainer=ddp", "resume=outputs/slurm-4711"]),
    ],
)
def test_command_of_a_job(
    leftover: str | None, given: tuple[str, ...], expected: list[str], cluster: Path
) -> None:
    if leftover is not None:
        (cluster / leftover).mkdir(parents=True)
    (cluster / "train.py").unlink()
    (cluster / "train.py").write_text("import sys\nsys.exit(5)\n")
    status, _, err = finish(submit(cluster, *given))
    assert status == 5, err
    assert command_of(cluster) == expected
    assert not requeued(cluster)


@pytest.mark.slow
@pytest.mark.ddp
def test_preempted_job_goes_back_to_the_queue_and_continues(cluster: Path) -> None:
    last = Path("outputs", "slurm-4711", "checkpoints", "last.ckpt")
    job = submit(cluster, *RUN)
    wait_for(cluster / last, job)
    for pid in (cluster / "started").read_text().split()[:2]:
        os.kill(int(pid), signal.SIGTERM)
    status, _, err = finish(job)
    assert status == 143, err
    assert (cluster / "scontrol.log").read_text() == "requeue 4711\n"
    status, _, err = finish(submit(cluster, *RUN))
    assert status == 0, err
    assert command_of(cluster)[-1] == "resume=outputs/slurm-4711"
    (cluster / "outputs").rename(cluster / "interrupted")
    status, _, err = finish(submit(cluster, *RUN))
    assert status == 0, err
    states = [
        torch.load(path, weights_only=True)["state_dict"]
        for path in (cluster / last, cluster / "interrupted" / Path(*last.parts[1:]))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not list(cluster.rglob("hpc_ckpt*"))


@pytest.mark.slow
@pytest.mark.ddp
def test_cancelled_job_does_not_come_back(cluster: Path) -> None:
    (cluster / "state").write_text("COMPLETING\n")
    job = submit(cluster, *RUN)
    wait_for(cluster / "outputs" / "slurm-4711" / "checkpoints" / "last.ckpt", job)
    for pid in (cluster / "started").read_text().split()[:2]:
        os.kill(int(pid), signal.SIGTERM)
    assert finish(job)[0] == 143
    assert not requeued(cluster)
