"""Names of runs."""

from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import memfold
from memfold.compression import Strategy
from memfold.logging.run_labels import RunLabels, label_run
from training.jobs import REPOSITORY


def label(
    options: Mapping[str, object],
    *,
    is_compressed: bool = True,
    kind: str = "digits",
    source: Mapping[str, object] = MappingProxyType({}),
    **config: object,
) -> RunLabels:
    strategy = Strategy.from_dict(options)
    net = nn.Linear(100, 100)
    counts = memfold.footprint(memfold.compress(net, strategy) if is_compressed else net)
    settings = {"seed": 1, "distill": {"teacher": None}, "backbone": {}, "callbacks": {}}
    settings |= {"init_from": None, "data": {}, "artifact": {"feedback_samples": 0}} | config
    choices = {"backbone": "resnet20", "data": kind}
    return label_run(settings, choices, strategy, counts, source)


@pytest.mark.parametrize(
    ("options", "name", "method"),
    [
        ({"name": "dense"}, "resnet20-dense-s1", "dense"),
        ({"name": "dense", "bits": 8}, "resnet20-dense-8bit-s1", "dense"),
        ({"name": "stable_rps", "ratio": 0.01}, "resnet20-stable_rps-0.01-s1", "stable_rps"),
        ({"name": "stable_rps"}, "resnet20-stable_rps-0.1-s1", "stable_rps"),
        (
            {"name": "stable_rps", "ratio": 0.01, "gradient_scale": "projection"},
            "resnet20-stable_rps-projection-0.01-s1",
            "stable_rps (gradient_scale=projection)",
        ),
        (
            {"name": "stable_rps", "ratio": 0.01, "bits": 4, "align_rows": True},
            "resnet20-stable_rps-align_rows-0.01-4bit-s1",
            "stable_rps (align_rows=True)",
        ),
        ({"name": "roast", "budget_bytes": 3000}, "resnet20-roast-3000B-s1", "roast"),
        (
            {"name": "rand", "ratio": 0.01, "rounds": 3, "include": ["weight", "w*"]},
            "resnet20-rand-include=weight+w*-rounds=3-0.01-s1",
            "rand (include=weight+w*, rounds=3)",
        ),
        ({"name": "ltr"}, "resnet20-ltr-0.1-s1", "ltr"),  # though it is dense at first
    ],
)
def test_a_name_says_what_was_asked_for(options: dict[str, object], name: str, method: str) -> None:
    labels = label(options)
    assert (labels.name, labels.method) == (name, method)
    assert labels.setting == "digits-" + name.removesuffix("-s1")
    assert labels.tags == (options["name"], "resnet20", "digits")


def test_custom_backbones_teachers_given_weights_and_averages_are_named() -> None:
    labels = label(
        {"name": "dense"},
        backbone={"target": "pkg.mod.Net"},
        distill={"teacher": "runs/1"},
        callbacks={"ema": {"decay": 0.9}},
        init_from="runs/2",
        artifact={"feedback_samples": 8},
    )
    assert labels.name == "Net-dense-distilled-pretrained-ema-feedback-s1"


def test_seeds_share_a_setting_and_nothing_else_does() -> None:
    options = {"name": "stable_rps", "ratio": 0.01}
    assert label(options).setting == label(options, seed=2).setting
    settings = {label({**options, **more}).setting for more in ({}, {"bits": 8}, {"ratio": 0.1})}
    assert len(settings) == 3


def test_other_files_and_targets_are_other_settings() -> None:
    sources = [
        {"file": "/a/flats.csv", "target": "price"},
        {"file": "/a/flats.csv", "target": "age"},
        {"file": "/b/flats.csv", "target": "price"},
    ]
    labels = [label({"name": "dense"}, kind="table", source=source) for source in sources]
    assert len({one.setting for one in labels}) == len({one.data for one in labels}) == 3
    assert labels[0].data.startswith("table flats.csv, price (")
    assert labels[0].setting == f"{labels[0].data}-resnet20-dense"
    assert labels[0].tags == ("dense", "resnet20", "table")
    own = label({"name": "dense"}, kind="custom", data={"target": "pkg.Data", "args": {"n": 2}})
    assert own.data.startswith("custom pkg.Data, n=2 (")


def test_the_options_of_the_configuration_are_the_defaults() -> None:
    """Otherwise every run would carry them in its name."""
    for name in memfold.strategies():
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            given = OmegaConf.to_container(
                compose("train", [f"compression={name}"]).compression, resolve=False
            )
        plain = {k: v for k, v in given.items() if k[0] != "_" and "${" not in str(v)}
        assert label({"name": name, **plain}, is_compressed=False).method == name
