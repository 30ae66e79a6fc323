"""Studies of real runs, of which the smallest takes a minute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from studies.tuned import REPOSITORY, SPACE, report

pytestmark = [pytest.mark.slow, pytest.mark.ddp, pytest.mark.timeout(1200)]

SMALL = ("backbone=mlp", "logger=csv", "trainer.max_epochs=2", "callbacks.progress_bar=null")


def call(*arguments: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tune(folder: Path, *overrides: str, **changes: object) -> None:
    file = folder / "space.yaml"
    lr = {"float": {"low": 0.01, "high": 0.2, "log": True}}
    parameters = SPACE["parameters"] | {"optimizer.lr": lr}
    file.write_text(yaml.safe_dump(SPACE | {"parameters": parameters} | changes, sort_keys=False))
    study = ("--study", "study", "--trials", "2")
    script = str(REPOSITORY / "scripts" / "tune.py")
    call(script, str(file), *study, "--", *SMALL, *overrides, folder=folder)


def config(run: Path) -> dict:
    """Return the configuration of a run, without what differs by seed and folder."""
    found = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    return found | {"seed": None}


def test_the_tuned_experiment_is_the_best_trial(tmp_path: Path) -> None:
    tune(tmp_path, "trainer=cpu", "compression=stable_rps", "ratio=0.1")
    content = report(tmp_path)
    assert content["num_trials"] == {"completed": 2, "pruned": 0, "failed": 0}
    assert content["test"]["test/acc"]["num_runs"] == 2
    study, train = tmp_path / "study", str(REPOSITORY / "train.py")
    best = study / "trials" / str(content["best"]["trial"]) / "s1"
    assert "test/acc" not in (best / "result.json").read_text()

    # As printed in the report, then in a sweep.
    printed = content["commands"]["A run with the best setting"].split()
    assert printed[:2] == ["python", "train.py"]
    call(train, *printed[2:], "hydra.run.dir=again", folder=tmp_path)
    expected = config(best)
    expected["trainer"]["limit_test_batches"] = 1.0
    assert config(tmp_path / "again") == expected
    again = (tmp_path / "again" / "metrics.csv").read_text()
    assert accuracies(again) == accuracies((best / "metrics.csv").read_text())
    sweep = ("-m", "seed=11,12", "hydra.sweep.dir=sweep")
    call(train, *printed[2:-1], *sweep, folder=tmp_path)
    for number, seed in enumerate((11, 12)):
        test = study / "test" / f"s{seed}" / "metrics.csv"
        swept = tmp_path / "sweep" / str(number) / "metrics.csv"
        assert accuracies(swept.read_text()) == accuracies(test.read_text())


def test_all_ranks_of_a_trial_get_its_setting(tmp_path: Path) -> None:
    seeds = {"tuning_seeds": [1], "test_seeds": [11]}
    tune(tmp_path, "trainer=ddp_cpu", "compression=stable_rps", "ratio=0.1", **seeds)
    content = report(tmp_path)
    for trial in content["trials"]:
        run = tmp_path / "study" / "trials" / str(trial["trial"]) / "s1"
        assert yaml.safe_load((run / "result.json").read_text())["environment"]["world_size"] == 2
        # Two processes with half the batch each are one with the whole batch: had they different
        # learning rates, they would not be.
        overrides = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
        alone = [text for text in overrides if text != "trainer=ddp_cpu"]
        folder = f"hydra.run.dir=alone{trial['trial']}"
        call(
            str(REPOSITORY / "train.py"),
            *alone,
            "trainer=cpu",
            "data.batch_size=128",
            folder,
            folder=tmp_path,
        )
        together = accuracies((run / "metrics.csv").read_text())
        assert together == pytest.approx(
            accuracies((tmp_path / f"alone{trial['trial']}" / "metrics.csv").read_text()), abs=0.01
        )
    assert (tmp_path / "study" / "experiment" / "study.yaml").exists()


def accuracies(metrics: str) -> list[float]:
    lines = [line.split(",") for line in metrics.splitlines()]
    column = lines[0].index("val/acc")
    return [float(line[column]) for line in lines[1:] if line[column]]
