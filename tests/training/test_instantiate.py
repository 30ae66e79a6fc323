"""The one place that turns `_target_` into objects."""

import pytest
import torch
from torch import nn

from memfold.errors import InputError
from memfold.logging.quiet import hush_libraries
from memfold.training.instantiate import instantiate

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}


def test_ready_made_arguments_are_passed_as_they_are() -> None:
    inner = nn.Linear(2, 2)
    parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = instantiate({"_target_": "torch.optim.SGD", "lr": 0.5}, "o", params=parameters)
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    assert instantiate({"_target_": "torch.nn.ModuleList"}, "m", modules=[inner])[0] is inner


def test_arguments_are_plain_containers() -> None:
    made = instantiate({"_target_": "builtins.dict", "a": [1, {"b": 2}]}, "d")
    assert type(made["a"]) is list
    assert type(made["a"][1]) is dict


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torch.nn.Lineal"}, "backbone: .*Lineal"),
        ({"_target_": "no_such_package.Net"}, "backbone: .*no_such_package"),
        (
            {**LINEAR, "width": 3},
            r"backbone\.width is no option; options: in_features,",
        ),
        ({"_target_": "torch.optim.SGD", "lr": -1, "params": []}, "backbone: "),
        ({"width": 3}, r"backbone\._target_"),
        (
            {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Nope"}]},
            "backbone: .*Nope",
        ),
    ],
)
def test_mistakes_name_the_key(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        instantiate(config, "backbone")


def test_programming_errors_are_not_the_users() -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        instantiate(
            {"_target_": "torch.utils.checkpoint.checkpoint", "use_reentrant": False},
            "x",
            function=broken,
        )


def test_a_missing_target_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    hush_libraries()
    for target in ("memfold.nope", "memfold.tasks.Nope", "memfold.nope.Net"):
        with pytest.raises(InputError, match=f"task: .*{target}"):
            instantiate({"_target_": target}, "task")
    assert not caplog.records
