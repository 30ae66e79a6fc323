"""Whole jobs that are resumed: the same experiment, or nothing changes."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.runs.locks import locked
from memfold.runs.recorded import read_config
from memfold.runs.same_experiment import keep_settings, refuse_other_experiment
from memfold.tasks import TaskModule
from memfold.training import load_model, run
from memfold.training.build import plain_config
from training.jobs import SMALL, compose_job
from training.run_contents import SENSITIVE, STRATEGIES, differences

SHARED = ("compression=stable_rps", "ratio=0.05", "data.batch_size=128")


def run_small(folder: Path, *overrides: str) -> dict[str, Any]:
    return run(compose_job(folder, *SMALL, *SHARED, "trainer.max_epochs=1", *overrides))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completed")
    run_small(folder)
    return folder


@pytest.fixture
def folder(completed: Path, tmp_path: Path) -> Path:
    """A copy of a completed run."""
    return Path(shutil.copytree(completed, tmp_path / "run"))


def test_another_experiment_is_refused_and_nothing_changes(folder: Path) -> None:
    before = contents(folder)
    for override, message in (
        ("seed=2", ": seed is 1 in that run, not 2; a resumed run keeps it"),
        ("ratio=0.1", ": ratio is 0.05 in that run, not 0.1;"),
        ("compression=roast", r": compression\._target_ is .*StableRPS in that run, not .*ROAST;"),
        ("compression.sign=weight", r": compression\.sign is column in that run, not weight;"),
        ("optimizer=adamw", r": optimizer\._target_ is .*SGD in that run, not .*AdamW;"),
        ("optimizer.lr=0.2", r": optimizer\.lr is 0\.1 in that run, not 0\.2;"),
        ("scheduler=constant", r": scheduler\._target_ is .*Cosine in that run, not .*Constant;"),
        ("data.split_seed=5", r": data\.split_seed is 0 in that run, not 5;"),
        ("data.train_subset=500", r": data\.train_subset is None in that run, not 500;"),
        ("data.batch_size=64", "num_nodes is 128 in that run, not 64;"),
        ("backbone.width=99", r": backbone\.width is 256 in that run, not 99;"),
        ("backbone=cnn", r": backbone\._target_ is .*build_mlp in that run, not .*CNN;"),
        ("trainer.precision=bf16-mixed", r": trainer\.precision is 32-true in that run"),
        ("trainer.limit_train_batches=2", r": trainer\.limit_train_batches is 1\.0 in that run"),
        ("trainer.devices=2", "num_nodes is 128 in that run, not 256;"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            run_small(folder, f"resume={folder}", "trainer.max_epochs=2", override)
        assert "\n" not in str(caught.value)
        assert contents(folder) == before, override
    assert run_small(folder, f"resume={folder}", "trainer.max_epochs=2")["epochs"] == 2


def test_where_and_how_long_a_run_goes_on_may_differ() -> None:
    before = {
        "seed": 1,
        "data": {"root": "a", "batch_size": 100},
        "trainer": {"devices": 1, "num_nodes": 1, "max_epochs": 3, "strategy": "auto"},
        "logger": {"_target_": "a"},
    }
    now = {
        "seed": 1,
        "data": {"root": "b", "batch_size": 25},
        "trainer": {"devices": 2, "num_nodes": 2, "max_epochs": 9, "strategy": {"_target_": "ddp"}},
        "logger": {"_target_": "b"},
        "extras": {"traceback": True},
    }
    refuse_other_experiment(Path("run"), before, now)
    now["trainer"] = {**before["trainer"], "devices": 5}
    advice = r"is 100 in that run, not 125; .*with data\.batch_size=20 on 5 process\(es\)$"
    with pytest.raises(InputError, match=advice):
        refuse_other_experiment(Path("run"), before, now)
    now["trainer"] = {**before["trainer"], "devices": 3}
    with pytest.raises(InputError, match=r"not 75; .*\(start a new run for another value\)$"):
        refuse_other_experiment(Path("run"), before, now)
    now["trainer"] = {**before["trainer"], "devices": -1}  # as many as the machine has
    refuse_other_experiment(Path("run"), before, now)


def test_the_number_of_processes_is_compared_with_the_checkpoint(folder: Path) -> None:
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("devices: 1\n", "devices: auto\n"))
    more = (f"resume={folder}", "trainer.max_epochs=2", "trainer.devices=auto")
    advice = r"is 128 in that run, not 64; .*with data\.batch_size=128 on 1 process"
    with pytest.raises(InputError, match=advice):
        run_small(folder, *more, "data.batch_size=64")
    assert run_small(folder, *more)["epochs"] == 2


def test_overrides_are_recorded_once_the_checkpoint_is_restored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder / ".hydra")

    def broken(*_: object) -> None:
        raise RuntimeError("while restoring")

    with monkeypatch.context() as patch:
        patch.setattr(TaskModule, "on_load_checkpoint", broken)
        with pytest.raises(RuntimeError, match="while restoring"):
            run_small(folder, f"resume={folder}", "trainer.max_epochs=2")
    assert contents(folder / ".hydra") == before
    run_small(folder, f"resume={folder}", "trainer.max_epochs=2")
    assert contents(folder / ".hydra") != before


def test_interrupted_extension_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            run_small(folder, f"resume={folder}", "trainer.max_epochs=3")
    assert (read(folder)["status"], read(folder)["epochs"]) == ("completed", 1)
    with pytest.raises(InputError, match=r"trainer\.max_epochs=2 must be at least 3"):
        run_small(folder, f"resume={folder}", "trainer.max_epochs=2")
    result = run_small(folder, f"resume={folder}", "trainer.max_epochs=3")
    assert (result["status"], result["epochs"]) == ("completed", 3)
    assert {"val/acc", "test/acc"} <= result["metrics"].keys()
    with pytest.raises(InputError, match=r"trainer\.max_epochs=3 must be above 3"):
        run_small(folder, f"resume={folder}", "trainer.max_epochs=3")


# 10 steps and 2 batches of validation an epoch; the last step is saved after the validation.
@pytest.mark.parametrize(
    ("every", "hook", "number", "saved"),
    [(7, "on_train_batch_end", 18, (14, 1)), (5, "on_validation_batch_end", 3, (15, 1))],
)
def test_a_run_goes_on_in_mid_epoch(
    tmp_path: Path, every: int, hook: str, number: int, saved: tuple[int, int]
) -> None:
    every_n_steps = f"+callbacks.last_checkpoint.every_n_train_steps={every}"
    overrides = (*SENSITIVE, *STRATEGIES["dense"], every_n_steps)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(compose_job(whole, *overrides))
    power_cut = (
        "+callbacks.cut._target_=training.signals.FailAt",
        f"+callbacks.cut.hook={hook}",
        f"+callbacks.cut.number={number}",
    )
    with pytest.raises(RuntimeError, match="power cut"):
        run(compose_job(cut, *overrides, *power_cut))
    last = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == saved
    run(compose_job(cut, *overrides, f"resume={cut}"))
    assert not differences(cut, whole)
    last = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 40


def test_summed_up_gradients_survive_several_power_cuts(tmp_path: Path) -> None:
    """A checkpoint between two steps would be one of a step whose gradients are half lost."""
    overrides = (
        *SENSITIVE,
        *STRATEGIES["dense"],
        "trainer.accumulate_grad_batches=4",
        "+callbacks.last_checkpoint.every_n_train_steps=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(compose_job(whole, *overrides))
    # Both after the first of four batches: the second comes right after the resumption.
    for number, resume in ((6, ()), (2, (f"resume={cut}",))):
        power_cut = (
            "+callbacks.cut._target_=training.signals.FailAt",
            "+callbacks.cut.hook=on_train_batch_start",
            f"+callbacks.cut.number={number}",
        )
        with pytest.raises(RuntimeError, match="power cut"):
            run(compose_job(cut, *overrides, *power_cut, *resume))
    run(compose_job(cut, *overrides, f"resume={cut}"))
    assert not differences(cut, whole)


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    overrides = (
        *SENSITIVE,
        "trainer.max_epochs=20",
        "optimizer.lr=0",
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=2",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(compose_job(whole, *overrides))["epochs"] == 3
    power_cut = (
        "+callbacks.cut._target_=training.signals.FailAt",
        "+callbacks.cut.hook=on_test_start",
        "+callbacks.cut.number=1",
    )
    with pytest.raises(RuntimeError, match="power cut"):
        run(compose_job(cut, *overrides, *power_cut))
    assert run(compose_job(cut, *overrides, f"resume={cut}"))["epochs"] == 3
    assert not differences(cut, whole)
    longer = (*overrides[:-1], "callbacks.early_stopping.patience=4", "trainer.max_epochs=30")
    assert run(compose_job(cut, *longer, f"resume={cut}"))["epochs"] == 5


def test_one_process_at_a_time(folder: Path) -> None:
    with locked(folder), pytest.raises(InputError, match=f"{folder} is in use by another process"):
        run_small(folder, f"resume={folder}", "trainer.max_epochs=2")
    run_small(folder, f"resume={folder}", "trainer.max_epochs=2")


def test_moved_run_knows_its_best_checkpoint(folder: Path) -> None:
    before = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    scores = [
        float(state["best_model_score"])
        for key, state in before["callbacks"].items()
        if "Checkpoint" in key and state["monitor"] == "val/acc"
    ]
    result = run_small(folder, f"resume={folder}", "trainer.max_epochs=2", "test_checkpoint=best")
    assert result["metrics"]["val/best_acc"] >= scores[0]
    after = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    paths = [s["best_model_path"] for k, s in after["callbacks"].items() if "Checkpoint" in k]
    assert len(paths) == 2
    assert all(Path(path).parent == folder / "checkpoints" for path in paths)


def test_junction_has_the_learning_rate_of_the_longer_run(folder: Path) -> None:
    run_small(folder, f"resume={folder}", "trainer.max_epochs=4")
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in rows if row["lr"]]
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx(expected)
    assert len([row for row in rows if row["memory/dense_bytes"]]) == 1


def test_artifact_is_there_before_the_test_set_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise InputError("data.root: the test set is damaged")

    monkeypatch.setattr("memfold.data.digits.Digits.load_test", damaged)
    with pytest.raises(InputError, match="is damaged"):
        run_small(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert read(tmp_path)["status"] == "failed"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run from before there was `structured`, when other defaults were others."""
    defaults = ("compression.sign=run", "compression.structured=share", "optimizer.lr=0.03")
    run_small(tmp_path / "older", *defaults)
    hydra = tmp_path / "older" / ".hydra"
    overrides = yaml.safe_load((hydra / "overrides.yaml").read_text())
    kept = [text for text in overrides if text not in defaults]
    (hydra / "overrides.yaml").write_text(yaml.safe_dump(kept))
    config = yaml.safe_load((hydra / "config.yaml").read_text())
    del config["compression"]["structured"]
    config["callbacks"]["best_checkpoint"]["filename"] = "../../elsewhere"
    (hydra / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "older"


def test_defaults_that_have_changed_since_neither_stop_nor_change_a_run(older: Path) -> None:
    for override, message in (
        ("compression.sign=column", r": compression\.sign is run in that run, not column;"),
        ("compression.structured=keep", r": compression\.structured is share in that run, not"),
        ("+optimizer.maximize=true", r": optimizer\.maximize is not set in that run, not True;"),
    ):
        with pytest.raises(InputError, match=message):
            run_small(older, f"resume={older}", override)
    compression = compression_of(load_model(older, "last"))
    assert compression is not None
    options = compression.strategy.to_dict()
    assert (options["sign"], options["structured"]) == ("run", "share")

    assert run_small(older, f"resume={older}", "trainer.max_epochs=2")["epochs"] == 2
    recorded = yaml.safe_load((older / ".hydra" / "config.yaml").read_text())
    assert recorded["compression"]["sign"] == "run"
    assert recorded["compression"]["structured"] == "share"
    assert (recorded["optimizer"]["lr"], recorded["trainer"]["max_epochs"]) == (0.03, 2)
    # Where files are written is no business of a folder's.
    assert recorded["callbacks"]["best_checkpoint"]["filename"] == "best"


def test_no_arguments_of_a_custom_backbone_were_an_empty_mapping(tmp_path: Path) -> None:
    custom = ("backbone=custom", "backbone.target=training.networks.DrawingNet")
    compose_job(tmp_path, *SMALL[1:], *custom)
    config = tmp_path / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("args: null", "args: {}"))
    now = compose_job(tmp_path, *SMALL[1:], *custom, f"resume={tmp_path}")
    given = keep_settings(now, tmp_path)
    before = read_config(tmp_path, ())
    assert before["backbone"]["args"] == {}
    refuse_other_experiment(tmp_path, before, plain_config(now), given)
