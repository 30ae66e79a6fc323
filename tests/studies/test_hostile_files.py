"""Files of studies that somebody else may have written are refused in one line."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from memfold.errors import InputError
from memfold.file_models import read_yaml
from memfold.studies.choose_plan import Plan
from memfold.studies.space import Space
from memfold.studies.sweep_plan import expand_sweep_arguments
from studies.tuned import tune

DEEP = "[" * 200_000
LARGE = "9" * 5000


LR = "parameters: {optimizer.lr: {float: {low: 0.1, high: 1}}}\ntuning_seeds: [1]\ntest_seeds: [2]"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("low: 0.1", "low: [0.1]", "parameters.optimizer.lr.float.low must be a number, got [0.1]"),
        ("low: 0.1", "low: -1e999", "low must be a finite number"),
        ("{low: 0.1, high: 1}", "[0.1, 1]", "optimizer.lr.float must be a mapping of high, log"),
        ("{float: {low: 0.1, high: 1}}", "{choice: [2026-01-01]}", "a choice is a number"),
        ("{float: {low: 0.1, high: 1}}", "{choice: [.nan]}", "a choice is a number"),
        ("{float: {low: 0.1, high: 1}}", "{int: {low: 1, high: 0x" + "9" * 99 + "}}", "at most"),
        ("optimizer.lr:", "1:", "parameters.1 must be a text"),
        ("optimizer.lr:", "hydra.run.dir=x:", "parameters.hydra.run.dir=x is no key of train.py"),
        ("[1]", "{1: 2}", "tuning_seeds must be a list"),
        ("[1]", f"[{', '.join(map(str, range(2000)))}]", "tuning_seeds must have at most 1000"),
    ],
)
def test_wrong_values_of_a_space_are_named(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(LR)
    read_yaml(file, Space)
    assert before in LR
    file.write_text(LR.replace(before, after))
    with pytest.raises(InputError) as error:
        read_yaml(file, Space)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "insert into trial_user_attributes (trial_id, key, value_json) "
            "values (1, 'hydra.run.dir', '7')",
            "trial 0: hydra.run.dir is unknown; there are reason, seconds, values",
        ),
        (
            "update trial_user_attributes set value_json = '\"much\"' where key = 'seconds'",
            "trial 0: seconds must be a number, got 'much'",
        ),
        (
            "update trial_params set param_name = 'hydra.run.dir' where param_name = 'scheduler'",
            "trial 0 is not of the study's space",
        ),
        ("update trial_params set param_value = 7", "study.db is damaged: "),
        (
            "update trial_params set param_value = 2.0 where param_name = 'optimizer.lr'",
            "trial 0 is not of the study's space",
        ),
        ("delete from trial_values", "trial 0 is not of the study's space"),
    ],
)
def test_a_damaged_study_is_refused(
    done: Path, statement: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    with sqlite3.connect(folder / "study" / "study.db") as database:
        database.execute(statement)
    database.close()
    capsys.readouterr()
    assert tune(folder, 1) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert tune(folder, 1) == 0
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested more than"),
        (f"seeds: [{LARGE}]", "Exceeds the limit"),
        (f"seeds: [0x{LARGE}]", "is no YAML|is missing"),
        ("&a [*a]", "it has an alias"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("seeds: 2026-01-01", "is missing"),
        ("null", "must be a mapping of bits, choose"),
    ],
)
def test_what_costs_or_runs_more_than_it_says(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    for model in MODELS:
        with pytest.raises(InputError, match=message if model is Plan else "file.yaml") as error:
            read_yaml(file, model)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


MODELS: list[Any] = [Plan, Space]
PLAN = """
overrides: [logger=csv]
methods: {dense: [compression=dense]}
seeds: [1]
choose: {key: optimizer.lr, values: [0.1], seed: 11, at: {0.1: [0.1]}}
bits: []
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds: [1]", "seeds: [[1]]", "seeds.0 must be a whole number, got [1]"),
        ("seeds: [1]", "seeds: [true]", "seeds.0 must be a whole number, got True"),
        ("seeds: [1]", "seeds: [4294967296]", "seeds.0 must be below 4294967296"),
        ("seeds: [1]", f"seeds: [0x{LARGE}]", "got a number of thousands of digits"),
        ("values: [0.1]", "values: {a: 1}", "choose.values must be a list, got {'a': 1}"),
        ("values: [0.1]", "values: [.nan]", "choose.values.0 must be a finite number"),
        ("values: [0.1]", "values: [1e999]", "choose.values.0 must be a finite number"),
        ("[logger=csv]", "[[logger, csv]]", "overrides.0 must be a text"),
        ("[logger=csv]", "logger=csv", "overrides must be a list"),
        ("dense: [compression=dense]", "dense: {a: b}", "methods.dense must be a list"),
        ("{0.1: [0.1]}", "[[0.1]]", "choose.at must be a mapping"),
        ("bits: []", f"bits: [{', '.join(['8'] * 2)}]", "bits: 8 is there twice"),
        ("bits: []", "bits: []\n" + "x" * 1000 + ": 1", "is unknown; there are bits, choose"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    read_yaml(file, Plan)
    assert before in PLAN
    file.write_text(PLAN.replace(before, after))
    with pytest.raises(InputError) as error:
        read_yaml(file, Plan)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


SWEEP: dict[str, Any] = {
    "command": "python train.py",
    "arguments": ["-m", "seed=1,2"],
    "jobs": [["seed=1"], ["seed=2"]],
    "attempt": 1,
    "host": "here",
    "pid": 1,
    "started": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attempt": [1]}, "attempt must be a whole number, got [1]"),
        ({"attempt": 0}, "attempt must be at least 1, got 0"),
        ({"attempt": True}, "attempt must be a whole number, got True"),
        ({"pid": 2**70}, "pid must be below 2147483648"),
        ({"started": "now"}, "started must be a number, got 'now'"),
        ({"jobs": [["seed=1", 2]]}, "jobs.0.1 must be a text, got 2"),
        ({"jobs": {"0": []}}, "jobs must be a list"),
        ({"arguments": "-m"}, "arguments must be a list, got '-m'"),
        ({"repeats": {"1": "0"}}, "repeats.1 must be a whole number, got '0'"),
        ({"hydra.run.dir": "/"}, "hydra.run.dir is unknown; there are arguments, attempt"),
        (DEEP, "is damaged or cannot be read (it is nested too deeply)"),
        (f'{{"attempt": {LARGE}}}', "is damaged or cannot be read (Exceeds the limit"),
        (b"\xff\xfe", "is damaged or cannot be read ("),
    ],
)
def test_a_damaged_sweep_is_refused(
    changes: dict[str, Any] | str | bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(SWEEP))  # of before there were repeats
    resume = f"sweep.resume={tmp_path}"
    assert expand_sweep_arguments(["-m", resume])[:2] == SWEEP["arguments"]
    if isinstance(changes, dict):
        file.write_text(json.dumps(SWEEP | changes))
    else:
        file.write_bytes(changes.encode() if isinstance(changes, str) else changes)
    with pytest.raises(InputError) as error:
        expand_sweep_arguments(["-m", resume])
    assert message in str(error.value)
    assert str(error.value).startswith(f"{resume}: {file} is damaged")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
