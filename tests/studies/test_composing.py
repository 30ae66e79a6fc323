"""What is looked at before the first of many runs."""

from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from memfold.data.digits import Digits
from memfold.errors import InputError
from memfold.studies.composing import compose_run, prepare_data
from training.jobs import REPOSITORY

CONF = REPOSITORY / "conf"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the data that were prepared."""
    found: list[int] = []
    monkeypatch.setattr(Digits, "prepare_data", lambda self: found.append(self.batch_size))
    return found


def test_each_data_set_is_prepared_once(prepared: list[int]) -> None:
    sizes = (8, 16, 8, 16)
    prepare_data([compose_run(CONF, [f"data.batch_size={size}"]) for size in sizes])
    assert prepared == [8, 16]


def test_what_only_a_run_knows_is_left_to_the_run(
    prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # an earlier test may have set it
    unknown = compose_run(CONF, ["data.root='${hydra:runtime.cwd}/data'"])
    prepare_data([unknown, compose_run(CONF, ["data.batch_size=8"])])
    assert prepared == [8]


def test_a_wrong_option_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.batch_size"):
        prepare_data([compose_run(CONF, ["data.batch_size=0"])])
    overrides = ["data=mnist", f"data.root={tmp_path}", "data.download=false"]
    with pytest.raises(InputError, match=r"data\.download=false"):
        prepare_data([compose_run(CONF, overrides)])
