"""The table at the end of a run."""

from pathlib import Path

import pytest

from memfold.runs.primary import show_number
from memfold.runs.result import describe_job
from memfold.training import run
from training.jobs import SMALL, compose_job


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        (54.321, "54.32"),
        (9876.54, "9877"),
        (-65590.7, "-65,591"),
        (3e12, "3e+12"),
        (1e-7, "1e-07"),
    ],
)
def test_numbers_have_four_digits_or_more(value: float, shown: str) -> None:
    assert show_number(value) == shown


def test_it_says_bits_samples_and_every_metric_of_the_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("data=diabetes", "optimizer=adamw", "trainer.max_epochs=1", "artifact.bits=4")
    result = run(compose_job(tmp_path, *SMALL, *options, "compression=stable_rps", "ratio=0.1"))
    assert sum(result["samples"].values()) == 442
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {cell[1].strip(): cell[2].strip() for cell in cells}
    assert rows["compression"] == "stable_rps, ratio 0.1, stored in 4 bits"
    assert rows["samples to train, validate, test"] == " / ".join(
        str(result["samples"][split]) for split in ("train", "val", "test")
    )
    metrics = result["metrics"]
    assert rows["test RMSE (last weights)"] == f"{metrics['test/rmse']:.4g}"
    assert rows["test RMSE as stored"] == f"{metrics['packed/test/rmse']:.4g}"
    others = f"mae {metrics['test/mae']:.4g}, r2 {metrics['test/r2']:.4g}"
    assert rows["other metrics of the test"] == others


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("backbone=mlp",), "mlp"),
        (("backbone=hf", "backbone.name=gpt2"), "hf gpt2"),
        (("backbone=custom", "backbone.target=a.b.Net"), "a.b.Net"),
    ],
    ids=str,
)
def test_a_backbone_is_named_as_far_as_it_goes(
    overrides: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    assert describe_job(compose_job(tmp_path, *overrides))["backbone"] == name


def test_the_recipe_says_which_of_the_backbones_of_a_name_it_is(tmp_path: Path) -> None:
    job = compose_job(tmp_path, "backbone=mlp", "backbone.hidden_widths=[]", "backbone.pooling=2")
    recipe = describe_job(job)["recipe"]
    found = {key: value for key, value in recipe.items() if key.startswith("backbone.")}
    assert found == {"backbone.width": 256, "backbone.hidden_widths": [], "backbone.pooling": 2}
