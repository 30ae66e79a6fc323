"""The experiments of the paper's family, and the published curves that stand beside them."""

import csv
from pathlib import Path

import pytest

from memfold.strategies import strategy_names
from studies.stand_in_repository import load_script
from training.jobs import REPOSITORY, compose_job

CONF = REPOSITORY / "conf"
script = load_script()
PUBLISHED = sorted((REPOSITORY / "results" / "published").glob("*.csv"))
SETTINGS = {
    "cifar10_resnet20": ("CIFAR10", "ResNet20"),
    "cifar100_resnet20": ("CIFAR100", "ResNet20"),
    "cifar10_vgg11": ("CIFAR10", "VGG11BN"),
    "cifar100_vgg11": ("CIFAR100", "VGG11BN"),
    "tiny_imagenet_resnet18": ("TinyImageNet", "ResNet18"),
}


def names_in(group: str) -> set[str]:
    return {file.stem for file in (CONF / group).glob("*.yaml")}


def test_the_experiments_are_those_that_take_the_protocol() -> None:
    files = (CONF / "experiment").glob("*.yaml")
    takers = {file.stem for file in files if "protocol/open_lth" in file.read_text()}
    assert set(script.EXPERIMENTS) == takers == set(SETTINGS)
    assert set(script.METHODS) <= set(strategy_names())


@pytest.mark.parametrize("name", script.EXPERIMENTS)
def test_an_experiment_has_the_settings_of_the_paper(name: str, tmp_path: Path) -> None:
    cfg = compose_job(tmp_path, f"experiment={name}", "compression=stable_rps", "ratio=0.01")
    data, backbone = SETTINGS[name]
    assert cfg.data._target_.endswith(f".{data}")
    assert cfg.backbone._target_.endswith(f".{backbone}")
    assert cfg.data.batch_size == 128
    assert (cfg.data.crop_padding, cfg.data.horizontal_flip) == (4, True)
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.1, 0.9)
    assert cfg.optimizer.nesterov is False
    assert cfg.optimizer.weight_decay == 1e-4
    assert cfg.scheduler._target_.endswith(".MultiStep")
    assert list(cfg.scheduler.milestones) == [80, 120]
    assert (cfg.scheduler.gamma, cfg.scheduler.warmup_epochs) == (0.1, 0.0)
    assert cfg.trainer.max_epochs == script.NUM_EPOCHS == 160
    assert cfg.trainer.precision == "32-true"
    assert cfg.test_checkpoint == "last"


def test_a_setting_of_an_experiment_can_be_changed(tmp_path: Path) -> None:
    changed = ("backbone=resnet20", "optimizer.lr=0.05", "trainer.max_epochs=3")
    cfg = compose_job(tmp_path, "experiment=cifar100_vgg11", *changed)
    assert cfg.backbone._target_.endswith(".ResNet20")
    assert (cfg.optimizer.lr, cfg.trainer.max_epochs) == (0.05, 3)
    assert cfg.data._target_.endswith(".CIFAR100")


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_curves_can_stand_beside_our_runs(file: Path) -> None:
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        rows = list(reader)
    assert reader.fieldnames == ["method", "dataset", "model", "ratio", "accuracy", "std"]
    cells = [(row["method"], row["dataset"], row["model"], row["ratio"]) for row in rows]
    assert len(set(cells)) == len(cells) > 0
    assert {row["method"] for row in rows} <= set(strategy_names())
    assert {row["dataset"] for row in rows} <= names_in("data")
    assert {row["model"] for row in rows} <= names_in("backbone")
    assert all(0 < float(row["ratio"]) <= 1 for row in rows)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert all(0 <= float(row["std"]) < 0.5 for row in rows)


def test_the_published_curves_of_synflow_are_whole_and_in_place() -> None:
    curves: dict[tuple[str, ...], dict[str, float]] = {}
    for file in PUBLISHED:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                assert file.stem.startswith(f"synflow_{row['dataset']}_{row['model'][:5]}")
                curve = (row["dataset"], row["model"], row["method"])
                curves.setdefault(curve, {})[row["ratio"]] = float(row["accuracy"])
    assert {len(curve) for curve in curves.values()} == {13}  # ratios 10 ** -(0, 0.25, ..., 3)
    assert {(data, model) for data, model, _ in curves} == {
        ("cifar10", "vgg11_bn"),
        ("cifar100", "vgg11_bn"),
        ("cifar10", "resnet18"),
        ("cifar100", "resnet18"),
        ("tiny_imagenet", "resnet18"),
    }
    assert curves["cifar10", "vgg11_bn", "synflow"]["0.01"] == pytest.approx(0.8683, abs=1e-4)
    assert curves["cifar100", "vgg11_bn", "snip"]["0.1"] == pytest.approx(0.6794, abs=1e-4)
    tiny = curves["tiny_imagenet", "resnet18", "synflow"]
    assert tiny["0.001"] == pytest.approx(0.1436, abs=1e-4)
