"""Sweep jobs in their own processes; a small program stands in for train.py."""

import json
import math
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from memfold.training.hydra_callbacks import RunFolderGuard, SweepSummary
from memfold.training.isolation import run_isolated
from training.jobs import SMALL, compose_job, train

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
    return compose_job(
        tmp_path / "sweep" / "4",
        *overrides,
        number=4,
        hydra_overrides=["hydra.mode=MULTIRUN", "hydra.sweep.dir=s", "hydra.verbose=x"],
    )


def run_program(cfg: DictConfig, body: str) -> tuple[float, Path]:
    folder = Path(HydraConfig.get().runtime.output_dir)
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("BODY", body))
    return run_isolated(cfg, script), folder


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
        "compression=stable_rps",
        "ratio=0.5",
        "seed=3",
        "logger=wandb",
        "logger.group='sweep'",
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


def test_summary_exits_with_an_error_when_a_job_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text('{"status": "completed"}')
    SweepSummary().on_multirun_end(config)
    out = capsys.readouterr().out
    assert out.index("│ 2 ") < out.index("│ 10 ")
    (tmp_path / "7" / "result.json").write_text('{"status": "failed"}')
    with pytest.raises(SystemExit) as stop:
        SweepSummary().on_multirun_end(config)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: 1 of 11 jobs failed\n"


def test_sweep_into_a_folder_with_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    RunFolderGuard().on_multirun_start(config)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text('{"status": "completed"}')
    with pytest.raises(SystemExit):
        RunFolderGuard().on_multirun_start(config)
    assert capsys.readouterr().err.startswith("error: hydra.sweep.dir=")


@pytest.mark.ddp
def test_sweep_goes_on_after_jobs_that_fail(tmp_path: Path) -> None:
    """A refused value, a job that is killed, one process, two processes."""
    killed = "training.networks.Killed"
    fine = "training.networks.DropoutNet"
    arguments = [text for text in SMALL if not text.startswith(("backbone", "trainer"))]
    status, out, err = train(
        "-m",
        *arguments,
        "backbone=custom",
        "trainer=ddp_cpu",
        "debug=fast",
        "logger=csv",
        f"backbone.target={killed},{fine}",
        "trainer.devices=1,2",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert status == 1
    assert err.splitlines()[-1] == "error: 2 of 4 jobs failed"
    results = [result(tmp_path / str(number)) for number in range(4)]
    assert [r["status"] for r in results] == ["failed", "failed", "completed", "completed"]
    assert "SIGKILL" in results[0]["error"]
    assert [r["environment"]["world_size"] for r in results[2:]] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "multirun.yaml"]
    assert out.count("completed") == 2
