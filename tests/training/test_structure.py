"""What a run logs of its masks."""

import csv
import math
from pathlib import Path

import pytest

from memfold.tasks import TaskModule
from memfold.training import run
from training.jobs import SMALL, compose_job

COMMON = (*SMALL, "data.batch_size=100", "ratio=0.05")


def health(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv that have a density."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["structure/effective_density"]]
    keys = [key for key in rows[0] if key.startswith(("structure/", "density/")) or key == "step"]
    return [{key: float(row[key]) for key in keys} for row in rows]


def train(folder: Path, *overrides: str) -> dict[str, object]:
    return run(compose_job(folder, *COMMON, *overrides))


def test_a_mask_that_stays_is_logged_once(tmp_path: Path) -> None:
    result = train(tmp_path, "compression=mag", "trainer.max_epochs=2")
    (row,) = health(tmp_path)
    assert row["step"] == 0
    sizes = {"hidden.0": 64 * 256, "hidden.2": 256 * 256, "head": 256 * 10}
    densities = {name: row[f"density/{name}.weight"] for name in sizes}
    kept = sum(round(densities[name] * size) for name, size in sizes.items())
    assert kept == round(0.05 * sum(sizes.values()))
    counts = [round(densities[name] * size) for name, size in sizes.items()]
    assert row["structure/min_layer_count"] == min(counts)
    assert row["structure/collapsed_layers"] == sum(count == 0 for count in counts)
    assert 0 < row["structure/effective_density"] <= 0.05
    compression = result["compression"]
    assert isinstance(compression, dict)
    assert math.isclose(compression["ratio"], 0.05, rel_tol=1e-3)


@pytest.mark.parametrize("strategy", ["rigl", "supermask"])
def test_a_run_that_is_resumed_within_an_epoch_logs_what_an_unbroken_one_does(
    strategy: str, tmp_path: Path
) -> None:
    options = [f"compression={strategy}", "trainer.max_epochs=2"]
    options += ["compression.update_every=5"] if strategy == "rigl" else []
    train(tmp_path / "whole", *options)
    stop = (
        "+callbacks.stop={_target_: training.signals.SignalAt, hook: on_train_batch_end, number: 7}"
    )
    with pytest.raises(SystemExit):
        train(tmp_path / "broken", *options, stop)
    train(tmp_path / "broken", *options, f"resume={tmp_path / 'broken'}")
    assert health(tmp_path / "broken") == health(tmp_path / "whole")


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        # 24 steps, no update from step 18 on.
        ("rigl", [0, 5, 10, 15]),
        ("supermask", [0, 11, 23]),
    ],
)
def test_changes_are_logged_and_a_resumed_run_repeats_none(
    strategy: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"compression={strategy}", "trainer.max_epochs=2"]
    options += ["compression.update_every=5"] if strategy == "rigl" else []
    train(tmp_path / "whole", *options)
    whole = health(tmp_path / "whole")
    assert [row["step"] for row in whole] == steps

    begin = TaskModule.on_train_epoch_start

    def break_off(task: TaskModule) -> None:
        if task.current_epoch == 1:
            raise RuntimeError("broken off")
        begin(task)

    with monkeypatch.context() as patched:
        patched.setattr(TaskModule, "on_train_epoch_start", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            train(tmp_path / "broken", *options)
    train(tmp_path / "broken", *options, f"resume={tmp_path / 'broken'}")
    assert health(tmp_path / "broken") == whole
