"""Search spaces are read, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from memfold.errors import InputError
from memfold.file_models import read_yaml
from memfold.runs.primary import Primary
from memfold.studies.space import Pruning, Space
from memfold.studies.tuned_configuration import write_override
from studies.tuned import REPOSITORY, SPACE, write_space


def test_every_kind_is_read(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        """
objective: {metric: packed/val/acc, direction: minimize}
pruner: {warmup_epochs: 3}
tuning_seeds: [1]
test_seeds: [2, 3]
parameters:
  optimizer.lr: {float: {low: 1e-3, high: 1, log: true}}
  data.batch_size: {int: {low: 16, high: 64}}
  data.horizontal_flip: {choice: [true, false]}
"""
    )
    space = read_yaml(file, Space)
    assert space.to_dict()["parameters"] == {
        "optimizer.lr": {"float": {"low": 0.001, "high": 1.0, "log": True}},
        "data.batch_size": {"int": {"low": 16, "high": 64, "log": False}},
        "data.horizontal_flip": {"choice": {"values": [True, False]}},
    }
    assert space.objective.metric == "packed/val/acc"
    assert space.objective.judged == Primary("val/acc", "min", "%")
    assert space.pruner == Pruning(startup_trials=5, warmup_epochs=3)
    assert (space.tuning_seeds, space.test_seeds) == ([1], [2, 3])


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "tuning").glob("*.yaml")), ids=lambda f: f.stem
)
def test_shipped_spaces_are_right(file: Path) -> None:
    assert not set(read_yaml(file, Space).tuning_seeds) & set(read_yaml(file, Space).test_seeds)


def parameter(entry: object) -> dict[str, Any]:
    return {"parameters": {"optimizer.lr": entry}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seeds": [1, 11]}, "tuning_seeds and test_seeds share 11"),
        ({"tuning_seeds": []}, "tuning_seeds must have at least 1 entry"),
        ({"tuning_seeds": [1, 1]}, "tuning_seeds: 1 is there twice"),
        ({"test_seeds": [True]}, "test_seeds.0 must be a whole number, got True"),
        ({"objective": {"metric": "test/acc"}}, "must be a validation metric"),
        ({"objective": {"metric": "val/rmse"}}, "direction of val/rmse must be 'maximize' or 'min"),
        ({"objective": {"direction": "up"}}, "must be 'maximize' or 'minimize', got 'up'"),
        ({"samplers": {}}, "samplers is unknown; there are objective, parameters"),
        ({"pruner": {"warmup": 1}}, "pruner.warmup is unknown; there are startup_trials"),
        ({"parameters": {}}, "parameters must have at least 1 entry"),
        ({"parameters": {"~x": {"choice": [1]}}}, "parameters.~x is no key of train.py"),
        (parameter({"log_uniform": [0, 1]}), "lr.log_uniform is unknown; there are choice, float"),
        (parameter({"float": {"low": 1, "high": 0.1}}), "low must be smaller than high"),
        (parameter({"float": {"low": 0, "high": 1, "log": True}}), "low must be above 0"),
        (parameter({"float": {"low": 0}}), "optimizer.lr.float.high is missing"),
        (parameter({"float": {"low": 0, "high": float("inf")}}), "high must be a finite number"),
        (parameter({"int": {"low": 0.5, "high": 1}}), "low must be a whole number"),
        (
            parameter({"float": {"low": 0, "high": 1, "step": 2}}),
            "lr.float.step is unknown; there are high, log, low",
        ),
        (parameter({"choice": []}), "optimizer.lr.choice must have at least 1 entry"),
        (parameter({}), "optimizer.lr must have one of float, int, choice"),
        (parameter({"choice": [[1, 2]]}), "a choice is a number, text"),
        (parameter({"choice": [1, 1.0]}), "choice: 1.0 is there twice"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_space(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_yaml(file, Space)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "a: [", "- 1", "a: 1\na: 2"])
def test_a_file_that_is_no_space_is_one_line(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "space.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=r"space\.yaml") as caught:
        read_yaml(file, Space)
    assert "\n" not in str(caught.value)


def test_the_definition_keeps_everything_that_the_file_says(tmp_path: Path) -> None:
    before = read_yaml(write_space(tmp_path), Space).to_dict()
    for changes in (
        {"sampler": {"seed": 1}},
        {"pruner": {}},
        {"test_seeds": [12]},
        {"objective": {"metric": "val/best_acc"}},
        {"parameters": SPACE["parameters"] | {"scheduler": {"choice": ["cosine"]}}},
    ):
        assert read_yaml(write_space(tmp_path, **changes), Space).to_dict() != before


@pytest.mark.parametrize(
    "value", [1e-05, 0.1, 123456789.123, 7, True, False, None, "a b", "it's", "null", "1", "a,b=c"]
)
def test_hydra_reads_back_the_same_value(value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides([write_override("a.b", value)])
    found = override.value()
    assert found == value
    assert type(found) is type(value)
