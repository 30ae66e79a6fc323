"""What a user types, and what is written for them."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from memfold.file_models import read_yaml
from memfold.studies.optuna_search import main
from memfold.studies.space import Space
from memfold.studies.tuned_configuration import Configuration, search_path
from studies.tuned import CONF, OVERRIDES, STAND_IN, arguments, report, trials


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"], STAND_IN, CONF)
    assert caught.value.code == 0
    assert "python scripts/tune.py tuning/sgd.yaml --study" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_numbers_are_checked(number: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["space.yaml", "--study", "x", f"--trials={number}"], STAND_IN, CONF)
    assert caught.value.code == 2
    assert f"whole number above 0, got {number}" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(CONF.parent / "scripts" / "tune.py"), run_name="__main__")
    assert caught.value.code == (
        "error: tuning needs the extra tune: pip install -c constraints.txt -e '.[tune]'"
    )


def test_the_best_setting_is_written_as_an_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    command = arguments(tmp_path, 2, "--write-experiment", "tuned")
    assert main(command, STAND_IN, conf) == 0
    file = conf / "experiment" / "tuned.yaml"
    before = file.read_text()
    assert "# python train.py experiment=tuned seed=1\n" in before

    made = Configuration(conf, OVERRIDES, read_yaml(tmp_path / "space.yaml", Space))
    best = trials(tmp_path)[report(tmp_path)["best"]["trial"]]
    expected = made.compose_task(made.overrides(best.setting))
    assert made.compose_task(["experiment=tuned"]) == expected
    search = search_path(str(tmp_path / "study"))
    assert made.compose_task([search, "experiment=study"]) == expected

    assert main(command, STAND_IN, conf) == 0  # its own file may be written again
    assert file.read_text() == before
    file.write_text("# @package _global_\n# Written by hand\n")
    assert main(command, STAND_IN, conf) == 1
    assert "exists and is not of this study" in capsys.readouterr().err
    assert file.read_text() == "# @package _global_\n# Written by hand\n"


def test_a_study_with_the_name_of_an_experiment_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # Hydra would find the other experiment first.
    command = arguments(tmp_path, 1)
    command[command.index("--study") + 1] = str(tmp_path / "fashion_mnist_cnn")
    assert main(command, STAND_IN, CONF) == 1
    assert "choose another name for the folder" in capsys.readouterr().err
    assert not (tmp_path / "fashion_mnist_cnn").exists()
