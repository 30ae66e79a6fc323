"""Runs killed at random moments, from the first import on (`pytest -m slow -s` shows which)."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from memfold.runs.folder import read_result
from memfold.training.round_tracker import RoundFolder
from training.jobs import start_training, train
from training.run_contents import SENSITIVE, STRATEGIES, differences

NUM_KILLS = 20
NUM_EPOCHS = {"dense": 60, "stable_rps": 60, "rigl": 60, "ltr": 25}


def phase(folder: Path) -> str:
    """Tell how far a run has come from what it has left."""
    if not (folder / ".hydra" / "overrides.yaml").exists():
        return "before there was a folder"
    if read_result(folder).get("status") == "completed":
        return "after the result was written"
    number = RoundFolder(folder).number
    if list(folder.rglob("*.partial")):
        return "writing a file"
    if (folder / "model.safetensors").exists():
        return "test, result or end of a round"
    if number > 0:
        return "training of a later round"
    if (folder / "checkpoints" / "last.ckpt").exists():
        return "training"
    return "before the first checkpoint"


def kill_at(seconds: float, *arguments: str) -> bool:
    """Start a run and kill it, unless it has ended before."""
    process = start_training(*arguments)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(3600)
def test_random_kills_and_exact_resumes(tmp_path: Path) -> None:
    random_times = random.Random(5)
    jobs, wholes, seconds = {}, {}, {}
    for strategy, options in STRATEGIES.items():
        kept = [text for text in options if not text.startswith("trainer.max_epochs")]
        jobs[strategy] = (*SENSITIVE, *kept, f"trainer.max_epochs={NUM_EPOCHS[strategy]}")
        wholes[strategy] = tmp_path / strategy
        start = time.monotonic()
        status, _, err = train(*jobs[strategy], f"hydra.run.dir={wholes[strategy]}")
        assert status == 0, err
        seconds[strategy] = time.monotonic() - start
    phases: Counter[str] = Counter()
    number = 0
    while number < NUM_KILLS:
        strategy = list(STRATEGIES)[number % len(STRATEGIES)]
        asynchronous = number // len(STRATEGIES) % 2 == 1
        folder = tmp_path / f"{number}"
        moment = random_times.uniform(0, seconds[strategy])
        arguments = (
            *jobs[strategy],
            f"checkpoint.asynchronous={asynchronous}",
            f"hydra.run.dir={folder}",
        )
        if not kill_at(moment, *arguments):  # it had ended before
            shutil.rmtree(folder)
            continue
        reached = phase(folder)
        phases[reached] += 1
        how = "asynchronous" if asynchronous else "synchronous"
        print(f"{number + 1:2} {strategy:10} {how:12} {moment:5.1f} s: {reached}", flush=True)
        if reached == "before there was a folder":
            status, _, err = train(*arguments)
            assert status == 0, err
        elif reached != "after the result was written":
            status, _, err = train(f"resume={folder}", SENSITIVE[4])
            assert status == 0, err
        assert not differences(folder, wholes[strategy]), (number, reached)
        number += 1
    print(*(f"{count:2} {name}" for name, count in phases.most_common()), sep="\n")
