from pathlib import Path

import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Problem
from reporting.fabricated import result, write_run


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a run that was started with a command."""
    monkeypatch.chdir(tmp_path)

    def write(name, overrides, seed=1, **changes):
        command = f"python train.py {overrides} seed={seed}"
        write_run(tmp_path / name, result(seed=seed, command=command, **changes))

    return write


def test_averaged_seeds_of_different_learning_rates_are_named(write):
    write("a", "optimizer.lr=0.1 compression=stable_rps", 1)
    write("b", "compression=stable_rps ++optimizer.lr=0.01", 2)
    write("c", "compression=stable_rps optimizer.lr=0.1", 3)
    write("d", "compression=stable_rps 'data.mean=[0, 1]'", 4)
    runs, problems = read(["a", "b", "c", "d"])
    assert len(runs) == 4
    start = "averaged seeds of stable_rps 0.1 differ in "
    assert problems == [
        Problem("digits, mlp", f"{start}data.mean: its default in a, [0, 1] in d"),
        Problem("digits, mlp", f"{start}optimizer.lr: 0.1 in a, 0.01 in b, its default in d"),
    ]


def test_averaged_seeds_of_different_checkpoints_are_named(write):
    write("a", "test_checkpoint=best", 1)
    write("b", "", 2)
    [problem] = read(["a", "b"])[1]
    assert problem.reason.endswith(" differ in test_checkpoint: best in a, its default in b")


def test_what_the_result_tells_or_does_not_depend_on_is_no_difference(write):
    write("a", "--config-name train ratio=0.1 logger=csv data.root=/one trainer=cpu", 1)
    write("b", "logger=wandb hydra.verbose=true data=digits callbacks.progress_bar=null", 2)
    write("c", "'unbalanced", 3)
    write_run(Path("d"), result(seed=4, command=None))
    runs, problems = read(["a", "b", "c", "d"])
    assert len(runs) == 4
    assert problems == []


def test_a_repeat_says_what_it_changed(write):
    write("a", "optimizer.lr=0.1")
    write("b", "optimizer.lr=0.01", **{"metrics__test/acc": 0.6})
    assert read(["a", "b"])[1] == [
        Problem(
            "b",
            "repeats a, with test accuracy 0.6000 where that has 0.8000 and "
            "optimizer.lr 0.01 where that has 0.1 (stable_rps 0.1, seed 1); left out",
        )
    ]
