"""What train.py does not know is refused before anything is trained; experiments say the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memfold.errors import InputError
from memfold.file_models import read_yaml
from memfold.studies.space import Space
from memfold.studies.tuned_configuration import Configuration, search_path
from studies.tuned import CONF, tune, write_space

LR = {"float": {"low": 0.01, "high": 1.0}}


def configuration(
    folder: Path, overrides: Sequence[str] = (), **parameters: dict[str, Any]
) -> Configuration:
    space = write_space(folder, parameters=parameters or {"optimizer.lr": LR})
    return Configuration(CONF, overrides, read_yaml(space, Space))


@pytest.mark.parametrize(
    ("overrides", "parameters", "message"),
    [
        ([], {"optimizer.lrr": LR}, "parameters: optimizer.lrr: optimizer.lrr is no key"),
        ([], {"scheduler": {"choice": ["cosine", "sine"]}}, "scheduler=sine is unknown; available"),
        ([], {"seed": {"int": {"low": 1, "high": 3}}}, "seed is given by the study"),
        (["optimizer.lr=0.1"], {"optimizer.lr": LR}, "optimizer.lr is a parameter of the search"),
        (["seed=3"], {"optimizer.lr": LR}, "the study gives every run its seed"),
        (["hydra.run.dir=x"], {"optimizer.lr": LR}, "the study gives every run its hydra.run.dir"),
        ([], {"backbone": {"choice": ["mlp", None]}}, "backbone: null is no choice of a group"),
        (["backbone=null"], {"optimizer.lr": LR}, "backbone=null: Config group override must be"),
        (["ratio=0.1,0.2"], {"optimizer.lr": LR}, "ratio=0.1,0.2: one value"),
        (["~callbacks.progress_bar"], {"optimizer.lr": LR}, "set it to null"),
        (["ratio=[["], {"optimizer.lr": LR}, "ratio=[["),
        (["epochs=3"], {"optimizer.lr": LR}, "epochs is no key"),
        (["debug=fast"], {"optimizer.lr": LR}, "debug=fast: this cannot be written into an exp"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, overrides: list[str], parameters: dict, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        configuration(tmp_path, overrides, **parameters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_made_after_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tune(tmp_path, 2, parameters={"optimizer.lrr": LR}) == 1
    assert capsys.readouterr().err.startswith("error: parameters: optimizer.lrr")
    assert [file.name for file in tmp_path.iterdir()] == ["space.yaml"]


def test_the_experiment_file_is_the_setting(tmp_path: Path) -> None:
    overrides = [
        "experiment=fashion_mnist_cnn",
        "data=digits",
        "compression=low_rank",
        "ratio=0.02",
        "backbone=mlp",
        "trainer=cpu",
        "+trainer.max_steps=7",
        "scheduler=multistep",
        "scheduler.milestones=[1,2]",
        "callbacks.progress_bar=null",
        "logger=csv",
        "compression.include=['*.weight','a, b']",
    ]
    setting = {"optimizer": "adamw", "optimizer.lr": 1e-05, "data.horizontal_flip": True}
    parameters = {
        "optimizer": {"choice": ["adamw"]},
        "optimizer.lr": LR,
        "data.horizontal_flip": {"choice": [False, True]},
    }
    made = configuration(tmp_path, overrides, **parameters)
    file = tmp_path / "study" / "experiment" / "tuned.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(made.experiment(setting, ["Tuned"]))
    search = search_path(str(tmp_path / "study"))
    found = made.compose_task([search, "experiment=tuned", "seed=5"])
    expected = made.compose_task([*made.overrides(setting), "seed=5"])
    assert found == expected
    assert found["optimizer"]["lr"] == 1e-05
    assert found["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert found["data"]["batch_size"] == 128  # of the experiment below it
    # The file is a default, which the command line may still change.
    assert made.compose_task([search, "experiment=tuned", "ratio=0.5"])["ratio"] == 0.5


def test_a_study_is_one_group_unless_the_user_named_one(tmp_path: Path) -> None:
    assert configuration(tmp_path, ["logger=wandb"]).group("a") == [
        "logger.group='a'",
        "logger.job_type=tune",
    ]
    assert configuration(tmp_path, ["logger=wandb", "logger.group=b"]).group("a") == [
        "logger.job_type=tune"
    ]
    assert configuration(tmp_path, ["logger=csv"]).group("a") == []
