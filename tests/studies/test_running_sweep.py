"""A sweep in this process: what its sweeper gets back. A small program stands in for the jobs."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from memfold.studies.sweep import RunningSweep
from studies.sweeps import STAND_IN, let, seen
from training.jobs import REPOSITORY


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DictConfig]:
    """Compose a sweep of four jobs, of which two repeat the others, two at once."""
    arguments = ["compression=dense", "ratio=0.1,0.2", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", [str(STAND_IN), "-m", *arguments])
    own = [f"hydra.sweep.dir={tmp_path}", "hydra.launcher.n_jobs=2"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3", job_name="train"):
        config = compose("train", own, return_hydra_config=True)
        config.hydra.overrides.task = arguments
        yield config


def test_a_sweeper_gets_the_accuracy_of_each_job(sweep: DictConfig, tmp_path: Path) -> None:
    let(tmp_path, 1, "fail")
    running = RunningSweep(sweep, resume=False)
    jobs = [
        ["compression=dense", f"ratio={ratio}", f"seed={seed}"]
        for ratio in (0.1, 0.2)
        for seed in (1, 2)
    ]
    values = [job.return_value for job in running.run_jobs(jobs, 0)]
    assert running.end(0) == 1
    assert values[::2] == [0.5, 0.5]
    assert all(math.isnan(value) for value in values[1::2])
    assert [text for text in seen(tmp_path, 1)[0]["argv"] if text in jobs[1]] == jobs[1]
    assert not (tmp_path / "2").exists()
