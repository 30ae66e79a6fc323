"""What a plan says is run, and what is wrong with one is said in one line."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from memfold.errors import InputError
from memfold.file_models import check, read_yaml
from memfold.strategies import strategy_names
from memfold.studies.choose import compose_methods, in_group
from memfold.studies.choose_plan import Plan
from memfold.studies.composing import compose_run
from studies.plans import PLAN, REPOSITORY, write_plan


def test_every_method_tries_as_many_values_with_another_seed(tmp_path: Path) -> None:
    plan = read_yaml(write_plan(tmp_path), Plan)
    assert plan.groups == [
        ("dense", None),
        ("synflow", 0.1),
        ("synflow", 0.01),
        ("projection", 0.1),
        ("projection", 0.01),
    ]
    for group in plan.groups:
        tried = plan.tried_runs(*group)
        assert [run.value for run in tried] == [0.01, 0.1, 1.0]
        assert all("seed=11" in run.overrides for run in tried)
    (first, *_) = plan.tried_runs("projection", 0.01)
    assert first.overrides == (
        "trainer.max_epochs=2",
        "logger=csv",
        "compression=stable_rps",
        "compression.gradient_scale=projection",
        "ratio=0.01",
        "optimizer.lr=0.01",
        "seed=11",
        "trainer.limit_test_batches=0",
    )


def test_the_compared_runs_are_all_ratios_and_seeds_once(tmp_path: Path) -> None:
    plan = read_yaml(write_plan(tmp_path), Plan)
    runs = [run for group in plan.groups for run in plan.compared_runs(*group, 0.1)]
    assert len({run.name for run in runs}) == len(runs) == 2 + 2 * 3 * 2
    found = {(run.method, run.budget) for run in runs}
    ratios = (0.3, 0.1, 0.01)
    assert found == {("dense", None)} | {(m, r) for m in ("synflow", "projection") for r in ratios}
    assert not any("ratio=" in text for run in runs if run.budget is None for text in run.overrides)
    assert not any(text.startswith("trainer.limit") for run in runs for text in run.overrides)


def test_budgets_may_be_bytes(tmp_path: Path) -> None:
    at = {"at": None, "at_bytes": {9000: [9_000_000, 5000]}}
    plan = read_yaml(write_plan(tmp_path, choose=at), Plan)
    runs = plan.compared_runs("synflow", 9000, 0.1)
    assert {text for run in runs for text in run.overrides if "budget_bytes" in text} == {
        "budget_bytes=9000000",
        "budget_bytes=5000",
    }
    assert not any(text.startswith("ratio=") for run in runs for text in run.overrides)
    assert runs[0].name == "synflow-9000000-lr0.1-s1"


def test_numbers_are_run_as_they_stand(tmp_path: Path) -> None:
    values = ["1e-5", 0.12345678, 0.12345679, 1]  # YAML takes the first for a text
    plan = read_yaml(write_plan(tmp_path, choose={"values": values}), Plan)
    runs = plan.tried_runs("dense", None)
    found = [text for run in runs for text in run.overrides if text.startswith("optimizer.lr=")]
    assert [float(text.partition("=")[2]) for text in found] == [1e-5, 0.12345678, 0.12345679, 1]
    assert len({run.name for run in runs}) == 4
    assert runs[-1].name == "dense-lr1-s11"


def test_a_plan_may_leave_nothing_to_choose(tmp_path: Path) -> None:
    content = yaml.safe_load(write_plan(tmp_path).read_text()) | {"ratios": [0.3, 0.01]}
    del content["choose"]
    plan = check(Plan, content)
    runs = [run for group in plan.groups for run in plan.compared_runs(*group, None)]
    assert not any(plan.tried_runs(*group) for group in plan.groups)
    assert len({run.name for run in runs}) == len(runs) == 2 + 2 * 2 * 2
    assert (runs[0].name, runs[-1].name) == ("dense-s1", "projection-0.01-s2")
    assert runs[-1].overrides[-2:] == ("ratio=0.01", "seed=2")
    for wrong in (content | {"choose": PLAN["choose"]}, content | {"ratios": None}):
        with pytest.raises(InputError, match="either choose or ratios is needed"):
            check(Plan, wrong)


@pytest.mark.parametrize(
    ("common", "own", "is_logged"),
    [
        ("wandb", "", True),
        ("csv", "wandb", True),
        ("wandb", "csv", False),
        ("csv", "", False),
        ("", "", True),  # the default of train.py
        ("none, by an experiment", "", False),
    ],
)
def test_runs_in_wandb_have_a_group_and_those_only_tried_are_told_apart(
    common: str, own: str, is_logged: bool, tmp_path: Path
) -> None:
    method = ["compression=mag", *([f"logger={own}"] if own else [])]
    given = ["debug=fast"] if common.startswith("none") else [f"logger={common}"] if common else []
    changes = {"overrides": ["trainer.max_epochs=2", *given], "methods": {"mag": method}}
    plan = read_yaml(write_plan(tmp_path, **changes), Plan)
    config = compose_methods(plan, REPOSITORY / "conf")["mag"]
    tried = in_group(plan.tried_runs("mag", 0.1)[0], config, "tune")
    compared = in_group(plan.compared_runs("mag", 0.1, 0.1)[0], config)
    assert ("logger.group='mag'" in tried) == is_logged
    assert ("logger.group='mag'" in compared) == is_logged
    assert ("logger.job_type=tune" in tried) == is_logged
    assert "logger.job_type=tune" not in compared
    for overrides in (tried, compared):
        compose_run(REPOSITORY / "conf", overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "seeds is missing"),
        ({"epochs": 3}, "epochs is unknown; there are bits, choose"),
        ({"seeds": [1, 1]}, "seeds: 1 is there twice"),
        ({"seeds": [-1]}, "seeds.0 must be at least 0, got -1"),
        ({"seeds": 1}, "seeds must be a list, got 1"),
        ({"bits": [2]}, "bits.0 must be 16, 8, 7, 6, 5, 4 or 3, got 2"),
        ({"methods": {}}, "methods must have at least 1 entry"),
        ({"methods": {"a/b": ["compression=mag"]}}, "methods.a/b must be a name of letters"),
        ({"choose": {"values": ["fast"]}}, "choose.values.0 must be a number, got 'fast'"),
        ({"choose": {"at": {0.1: [2.0]}}}, "choose.at.0.1.0 must be at most 1, got 2"),
        ({"choose": {"at": {0: [0.1]}}}, "choose.at.0 must be above 0, got 0"),
        ({"choose": {"at": None}}, "choose: either at (ratios) or at_bytes is needed"),
        (
            {"choose": {"at_bytes": {900: [900]}}},
            "choose: either at (ratios) or at_bytes is needed",
        ),
        ({"choose": {"at": None, "at_bytes": {0.1: [900]}}}, "choose.at_bytes.0.1 must be"),
        ({"choose": {"at": None, "at_bytes": {900: [900, 800], 800: [800]}}}, "800 is there twice"),
        ({"choose": {"trials": 3}}, "choose.trials is unknown"),
        ({"choose": {"values": [1, 1.0]}}, "choose.values: 1.0 is there twice"),
        ({"choose": {"values": [0.1, "nan"]}}, "choose.values.1 must be a number, got 'nan'"),
        ({"choose": {"at": {0.1: [0.1], 0.01: [0.01, 0.1]}}}, "choose.at: 0.1 is there twice"),
        ({"choose": {"at": {0.1: [0.1], "1e-1": [0.2]}}}, "0.1 is there twice"),
        ({"choose": {"key": "seed"}}, "choose.key cannot be seed"),
        ({"methods": {"a": ["compression=mag", "ratio=1"]}}, "methods.a: ratio cannot be set"),
        ({"overrides": ["+optimizer.lr=1"]}, "overrides: optimizer.lr cannot be set there"),
        (
            {"overrides": ["artifact.bits=8"], "bits": [4]},
            "overrides: artifact.bits cannot be set there",
        ),
        (
            {"methods": {"a": ["compression=mag"], "b": ["compression=mag"]}},
            "methods a and b are the same",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(write_plan(tmp_path, **changes), Plan)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is no YAML"),
        ("- 1", "must be a mapping"),
        ("methods:\n  mag: [a]\n  mag: [b]\n", "mag is there twice.*line 3"),
        (None, "cannot"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_yaml(file, Plan)


def test_plans_of_the_repository_compose() -> None:
    runs = {}
    for file in sorted((REPOSITORY / "comparisons").glob("*/*.yaml")):
        plan = read_yaml(file, Plan)
        for method, place in dict(plan.groups).items():  # places differ in the budget alone
            (run, *_) = plan.compared_runs(method, place, plan.choose.values[0])
            runs[(*plan.overrides, *plan.methods[method])] = run  # pieces have most in common
    assert len(runs) > 50
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3", job_name="train"):
        for run in runs.values():
            name = compose("train", list(run.overrides)).compression._target_.split(".")[-2]
            assert name in strategy_names()
