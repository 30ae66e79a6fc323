"""Every configuration file composes, and what it describes can be built."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_object
from lightning.pytorch import Trainer
from torch import nn

from memfold.training.build import build
from memfold.training.instantiate import instantiate
from memfold.training.job import run_job
from memfold.training.schedules import Schedule
from training.jobs import REPOSITORY, SMALL, compose_job


def options(group: str) -> list[str]:
    names = sorted(file.stem for file in (REPOSITORY / "conf" / group).glob("*.yaml"))
    assert names
    return names


def test_groups_are_those_of_the_contract() -> None:
    folders = {path.name for path in (REPOSITORY / "conf").iterdir() if path.is_dir()}
    assert folders == {
        "compression",
        "backbone",
        "data",
        "task",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        "callbacks",
        "experiment",
        "debug",
    }
    assert {"cpu", "gpu", "ddp", "ddp_cpu", "fsdp", "auto"} == set(options("trainer"))
    assert {"csv", "wandb", "tensorboard"} == set(options("logger"))
    assert {"open_lth"} == set(options("experiment/protocol"))


def described(value: object) -> Iterator[dict[str, Any]]:
    """Yield every mapping with a `_target_` in the contents of a YAML file."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from described(item)


def test_no_file_says_a_default_that_python_says() -> None:
    for file in (REPOSITORY / "conf").glob("*/**/*.yaml"):
        for section in described(yaml.safe_load(file.read_text())):
            target = get_object(section["_target_"])
            function = target.__init__ if isinstance(target, type) else target
            if not function.__module__.startswith("memfold."):
                continue  # another library's defaults may change
            for name, parameter in inspect.signature(target).parameters.items():
                assert name not in section or section[name] != parameter.default, (file, name)


@pytest.mark.parametrize("name", options("scheduler"))
def test_schedulers_have_every_option_with_its_default(name: str, tmp_path: Path) -> None:
    cfg = compose_job(tmp_path, f"scheduler={name}")
    schedule = instantiate(dict(cfg.scheduler), "scheduler")
    assert isinstance(schedule, Schedule)
    assert {k: v for k, v in cfg.scheduler.items() if k != "_target_"} == vars(schedule)


@pytest.mark.parametrize("name", options("optimizer"))
def test_optimizers_take_the_parameters(name: str, tmp_path: Path) -> None:
    cfg = compose_job(tmp_path, f"optimizer={name}")
    settings = {key: value for key, value in cfg.optimizer.items() if key != "decay"}
    made = instantiate(settings, "optimizer", params=[nn.Parameter(torch.zeros(1))])
    for key, value in settings.items():
        if key not in ("_target_", "betas"):
            assert made.param_groups[0][key] == value


@pytest.mark.parametrize("name", ["auto", "cpu", "ddp_cpu"])
def test_trainers_can_be_built_here(name: str, tmp_path: Path) -> None:
    trainer = build(compose_job(tmp_path, *SMALL, f"trainer={name}"), tmp_path).trainer
    assert isinstance(trainer, Trainer)
    assert trainer.world_size == (2 if name == "ddp_cpu" else 1)


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_compose(name: str, tmp_path: Path) -> None:
    cfg = compose_job(tmp_path, f"experiment={name}", "compression=stable_rps", "debug=fast")
    assert cfg.trainer.max_epochs == 1
    assert "no_further_logger" in cfg.logger._target_


@pytest.mark.parametrize("scheduler", options("scheduler"))
@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_optimizers_and_schedulers_train_together(
    optimizer: str, scheduler: str, tmp_path: Path
) -> None:
    names = (f"optimizer={optimizer}", f"scheduler={scheduler}")
    result = run_job(compose_job(tmp_path, *SMALL, *names, "debug=fast"))
    assert result["status"] == "completed"


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_write_beside_the_metrics_file(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = compose_job(tmp_path, *SMALL, "debug=fast", f"logger={logger}")
    assert run_job(cfg)["status"] == "completed"
    assert (tmp_path / "metrics.csv").exists()
    assert list((tmp_path / logger).iterdir())
