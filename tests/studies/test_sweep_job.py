"""Sweep jobs in their own processes; a small program stands in for train.py."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, read_write

from memfold.errors import InputError
from memfold.studies.process import StopSignal, job_environment
from memfold.studies.runner import Runner
from memfold.studies.sweep_job import SweepJob, run_sweep_job
from training.jobs import REPOSITORY, SMALL, compose_job, train_forked

PROGRAM = """
import json, os, pathlib, signal, sys
[text] = [text for text in sys.argv if text.startswith("hydra.run.dir=")]
folder = pathlib.Path(text.removeprefix("hydra.run.dir=").strip("'"))
kept = {name: os.environ.get(name) for name in ("LOCAL_RANK", "PL_GLOBAL_SEED", "HOME")}
(folder / "seen.json").write_text(json.dumps({"argv": sys.argv[1:], "environment": kept}))
BODY
"""


@pytest.fixture
def job(tmp_path: Path) -> DictConfig:
    overrides = ["compression=stable_rps", "ratio=0.5", "seed=3", "logger=wandb"]
    of_the_sweep = ["hydra.mode=MULTIRUN", "hydra.sweep.dir=s", "hydra/launcher=joblib"]
    return compose_job(
        tmp_path / "sweep" / "4",
        *overrides,
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        number=4,
        hydra_overrides=[*of_the_sweep, "hydra.output_subdir=null", "hydra.verbose=x"],
    )


def run_program(cfg: DictConfig, body: str) -> tuple[float | None, Path]:
    folder = Path(HydraConfig.get().runtime.output_dir)
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("BODY", body))
    return run_sweep_job(cfg, script), folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


COMPLETED = """(folder / "result.json").write_text(
    json.dumps({"status": "completed", "metrics": {"val/acc": 0.0}}))"""


def test_job_gets_its_overrides_its_folder_and_a_clean_environment(
    job: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    accuracy, folder = run_program(job, COMPLETED)
    assert accuracy == 0.0
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["argv"] == [
        "--config-name",
        "train",
        "--config-path",
        str(REPOSITORY / "conf"),
        "compression=stable_rps",
        "ratio=0.5",
        "seed=3",
        "logger=wandb",
        "logger.group='sweep'",
        "logger.job_type=sweep",
        "hydra.verbose=x",
        "hydra.mode=RUN",
        f"hydra.run.dir='{folder}'",
        "hydra.job.num=4",
    ]
    assert seen["environment"]["LOCAL_RANK"] is None
    assert seen["environment"]["PL_GLOBAL_SEED"] is None
    assert seen["environment"]["HOME"] is not None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(3)", "status 3"),
        (
            '(folder / "result.json").write_text(json.dumps({"status": "failed", "error": "not '
            'finished: still running, or killed before the end"}))\nos._exit(7)',
            "status 7",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        (
            '(folder / "result.json").write_text(\'{"status": "failed", "error": "not finished", '
            '"parameters": {"dense": 7}}\')\nos.kill(os.getpid(), signal.SIGKILL)',
            "killed by SIGKILL",
        ),
    ],
)
def test_job_that_dies_is_recorded_for_it(job: DictConfig, body: str, reason: str) -> None:
    accuracy, folder = run_program(job, body)
    assert accuracy is not None
    assert math.isnan(accuracy)
    found = result(folder)
    assert found["status"] == "failed"
    assert reason in found["error"]
    assert found["compression"]["name"] == "stable_rps"
    assert found["seed"] == 3
    if "parameters" in body:
        assert found["parameters"] == {"dense": 7}


def test_reason_that_the_job_gave_is_kept(job: DictConfig) -> None:
    body = """(folder / "result.json").write_text('{"status": "failed", "error": "mine"}')
sys.exit(1)"""
    accuracy, folder = run_program(job, body)
    assert accuracy is not None
    assert math.isnan(accuracy)
    assert result(folder)["error"] == "mine"


def test_interrupt_stops_the_job(job: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the sweep while the job sleeps; the job gets it and may finish its notes."""
    body = """
import threading, time
def note(*_):
    (folder / "stopped").write_text("yes")
    sys.exit(130)
signal.signal(signal.SIGINT, note)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""
    with pytest.raises(KeyboardInterrupt):
        run_program(job, body)
    assert (Path(HydraConfig.get().runtime.output_dir) / "stopped").read_text() == "yes"


def test_job_that_is_stopped_before_it_can_say_so_is_no_riddle(job: DictConfig) -> None:
    body = """
import time
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
(folder / "is_ready").touch()
time.sleep(60)
"""
    folder, stop = Path(HydraConfig.get().runtime.output_dir), StopSignal(lets_save=False)

    def interrupt() -> None:
        while not (folder / "is_ready").exists():
            time.sleep(0.01)
        stop.note(signal.SIGINT)

    script = folder / "program.py"
    script.write_text(PROGRAM.replace("BODY", body))
    threading.Thread(target=interrupt).start()
    SweepJob.of(job, script).bring_to_end(Runner(script, stop))
    assert result(folder)["error"] == "its process was stopped by SIGINT"


def test_completed_job_is_not_run_again(job: DictConfig) -> None:
    _, folder = run_program(job, COMPLETED)
    assert run_program(job, "sys.exit(1)")[0] == 0.0
    assert result(folder)["status"] == "completed"


@pytest.mark.parametrize("checkpoint", ["checkpoints/last.ckpt", "rounds/0/result.json"])
def test_unfinished_job_is_continued(job: DictConfig, checkpoint: str) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / checkpoint).parent.mkdir(parents=True)
    (folder / checkpoint).touch()
    run_program(job, COMPLETED)
    assert json.loads((folder / "seen.json").read_text())["argv"][-1] == f"resume='{folder}'"


def test_dead_job_leaves_no_process_behind(
    job: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfold.studies.process._SECONDS_TO_FOLLOW", 0.5)
    body = """
import subprocess
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / "rank").write_text(str(rank.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    _, folder = run_program(job, body)
    try:
        rank = psutil.Process(int((folder / "rank").read_text()))
        rank.wait(5)
    except psutil.NoSuchProcess:
        pass


def test_task_of_one_does_not_see_the_cluster() -> None:
    cluster = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "5",
        "SUBMITIT_FOLDER": "f",
    }
    for executor in ("slurm", "local"):
        kept = job_environment({**cluster, "SUBMITIT_EXECUTOR": executor, "HOME": "/"})
        assert kept.pop("MEMFOLD_PARENT_PID") == str(os.getpid())
        assert kept == {"HOME": "/"}
    assert "SLURM_NTASKS" not in job_environment({"SLURM_NTASKS": "", "SUBMITIT_EXECUTOR": "slurm"})
    # A batch script that asked for several tasks, in which a sweep runs them one after the other.
    assert "SLURM_NTASKS" not in job_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})


def test_one_task_of_several_finds_its_rank() -> None:
    """Two nodes with two tasks each: Lightning takes the four of them for one run."""
    variables = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "MASTER_ADDR": "node0",
    }
    kept = job_environment(variables)
    assert kept.pop("MEMFOLD_PARENT_PID") == str(os.getpid())
    assert kept == variables


def test_second_task_writes_no_records(job: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    _, folder = run_program(job, "print('hello')\nsys.exit(3)")
    assert not (folder / "result.json").exists()
    assert not (folder.parent / ".sweep").exists()
    assert (folder / "console_1.log").read_text() == "hello\n"


def test_folder_of_another_job_is_refused(job: DictConfig) -> None:
    """Where the sweeper makes the jobs up as it goes, this is all that can be done."""
    _, folder = run_program(job, COMPLETED)
    config: Any = HydraConfig.instance().cfg
    with read_write(config.hydra):
        config.hydra.job.num = 5
    with pytest.raises(InputError, match=r"job 5 \(.*\) has the folder 4 of job 4 \(.* seed=3"):
        run_program(job, COMPLETED)
    assert result(folder)["status"] == "completed"


def test_lost_note_of_a_completed_job_is_written_again(job: DictConfig) -> None:
    _, folder = run_program(job, COMPLETED)
    note = folder.parent / ".sweep" / "jobs" / "4.json"
    note.write_text("{")
    run_program(job, COMPLETED)
    assert json.loads(note.read_text())["overrides"][2] == "seed=3"


@pytest.mark.slow
@pytest.mark.ddp
def test_sweep_goes_on_after_jobs_that_fail(tmp_path: Path) -> None:
    """A job that is killed, and one of two processes."""
    killed = "training.networks.Killed"
    fine = "training.networks.DropoutNet"
    arguments = [text for text in SMALL if not text.startswith(("backbone", "trainer"))]
    status, out, err = train_forked(
        "-m",
        *arguments,
        "backbone=custom",
        "trainer=ddp_cpu",
        "trainer.devices=2",
        "debug=fast",
        "logger=csv",
        f"backbone.target={killed},{fine}",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert status == 1
    assert err.splitlines()[-1].startswith("error: 1 of 2 jobs failed; ")
    results = [result(tmp_path / str(number)) for number in range(2)]
    assert [r["status"] for r in results] == ["failed", "completed"]
    assert "SIGKILL" in results[0]["error"]
    assert results[1]["environment"]["world_size"] == 2
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"0", "1", ".sweep"}
    assert out.count(": completed, test/acc ") == 1
    logs = {file.name for file in (tmp_path / "1").glob("*.log")}
    assert logs == {"train.log", "console.log"}  # none of the second process
    overrides = (tmp_path / "1" / ".hydra" / "overrides.yaml").read_text()
    assert "trainer.devices=2" in overrides  # rank 0 alone has written it
