"""Any primary metric, to be maximised or minimised, from the folder to the files of a report."""

import csv
import io
import json
from pathlib import Path

import pytest

from memfold.reporting.details import draw_curves, draw_memory
from memfold.reporting.drawing import house_style
from memfold.reporting.metrics import axis_title, columns, name_of, write
from memfold.reporting.planes import draw_plane
from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Problem, Setting
from memfold.reporting.run_lines import to_run_lines
from memfold.reporting.statistics import AXES, common_request, points
from memfold.reporting.styles import styles
from memfold.reporting.tables import to_csv, to_markdown
from memfold.runs.primary import ACCURACY, Primary
from reporting.fabricated import language_result, packed, reasons, result, write_run
from reporting.page.comparisons import one_run

BPB = Primary("val/bpb", "min", "bits per byte")
RMSE = Primary("val/rmse", "min", "RMSE")
LANGUAGE = Setting("shakespeare", "gpt", BPB)
LOOKS = styles(["dense", "mag", "stable_rps"])


@pytest.fixture
def mixed(here):
    """A folder with runs of two tasks, and a problem in each."""
    rows = [{"step": n, "val/bpb": 4 - n, "train/loss": 2 - n / 2} for n in range(3)]
    for seed in (1, 2):
        for method, bpb in (("stable_rps", 2.4), ("mag", 3.9)):
            one = language_result(method, seed=seed, bpb=bpb + 0.01 * seed)
            folder = write_run(here / "runs" / f"{method}{seed}", one, rows)
            write_run(folder / "packed" / "8", packed(one, 8, bpb + 0.1, "bpb"))
            write_run(here / "runs" / f"digits-{method}{seed}", result(method, seed=seed))
    write_run(here / "runs" / "dense", language_result("dense", bpb=2.2))
    write_run(here / "runs" / "again", language_result("dense", bpb=2.3))
    write_run(here / "runs" / "bad", result(primary=language_result()["primary"]))
    return here / "runs"


@pytest.mark.parametrize(
    ("primary", "name", "axis", "in_files"),
    [
        (ACCURACY, "accuracy", "test accuracy, %", ("accuracy", "val_accuracy")),
        (BPB, "bits per byte", "test bits per byte (lower is better)", ("test/bpb", "val/bpb")),
        (RMSE, "RMSE", "test RMSE (lower is better)", ("test/rmse", "val/rmse")),
        (Primary("val/f1", "max", "%"), "f1", "test f1, %", ("test/f1", "val/f1")),
        (Primary("val/r2", "max", "R\u00b2"), "R\u00b2", "test R\u00b2", ("test/r2", "val/r2")),
    ],
)
def test_a_metric_is_named_with_its_unit_and_its_direction(primary, name, axis, in_files):
    assert (name_of(primary), axis_title(primary), columns(primary)) == (name, axis, in_files)


def test_bars_are_whole_and_end_where_shares_do():
    spread = (("mag", (0.88, 0.90, 0.92)), ("snip", (0.1, 0.1)), ("rand", (0.99, 1.0, 1.0)))
    runs = [
        one_run(method, ratio=0.1, seed=seed, accuracy=accuracy)
        for method, accuracies in spread
        for seed, accuracy in enumerate(accuracies)
    ]
    with house_style():
        figure = draw_plane(
            points(runs, AXES["ratio"]),
            AXES["ratio"],
            styles([method for method, _ in spread]),
            note="x",
        )
    near = figure.axes[0]
    ends = [y for bars in near.collections for bar in bars.get_segments() for y in bar[:, 1]]
    low, high = near.get_ylim()
    least = 0.9 - 4.302653 * 0.02 / 3**0.5
    assert min(end for end in ends if end > 0.5) == pytest.approx(least)
    assert max(ends) == 1
    assert low < least < 1 < high


def test_values_are_percent_or_have_four_digits():
    assert write(0.81234, ACCURACY) == "81.23"
    assert write(2.40849, BPB) == "2.408"
    assert write(0.0123, BPB, mean=2.40849) == "0.012"
    assert [write(v, RMSE) for v in (53.4271, 123456.7, 0.0012346, 0.0, -0.5)] == [
        "53.43",
        "123,457",
        "0.001235",
        "0.000",
        "-0.5000",
    ]


def test_a_run_has_the_values_of_its_metric(here):
    write_run(here / "last", language_result(seed=1))
    write_run(here / "best", language_result(seed=2, test_checkpoint="best"))
    write_run(here / "8", packed(language_result(seed=3), 8, 2.7, "bpb"))
    write_run(here / "far", language_result(seed=4, bpb=1e6))
    runs, problems = read([here])
    assert problems == []
    assert {run.setting for run in runs} == {LANGUAGE}
    assert {run.folder: (run.test, run.val) for run in runs} == {
        "last": (2.5, 2.6),
        "best": (2.5, 2.4),
        "8": (2.7, 2.7),
        "far": (1e6, 1e6 + 0.1),
    }


@pytest.mark.parametrize("value", [None, "2.5", True, 1e300])
def test_a_value_that_cannot_be_right_is_named(here, value):
    write_run(here / "bad", language_result(**{"metrics__test/bpb": value}))
    runs, problems = read([here])
    assert runs == []
    assert reasons(problems)["bad"].startswith("metrics.test/bpb must be ")


def test_metrics_are_never_mixed(mixed):
    runs, problems = read([mixed])
    assert problems == [
        Problem("runs/bad", "metrics.test/bpb must be a number, got None"),
        Problem(
            "runs/dense",
            "repeats runs/again, with test bits per byte 2.2000 where that has 2.3000 "
            "(dense, seed 1); left out",
        ),
    ]
    comparison = Comparison(tuple(runs))
    lines = to_markdown(comparison, "Both").splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## digits, mlp",
        "## shakespeare, gpt, bits per byte",
        "## What is a tie",
    ]
    assert [line.split(" | ")[4] for line in lines if line.startswith("| method")] == [
        "test accuracy, %",
        "test bits per byte (lower is better)",
    ]
    assert (
        "| stable_rps | 32 | 0.1 | 2 | **2.415 \u00b1 0.007** | 2.351 to 2.479 | 10,025 |"
        in "\n".join(lines)
    )
    assert "| 0.1 | stable_rps: 2.415 \u00b1 0.007 | - | 0 of 1 |" in lines
    assert "| 0.1 | mag: 80.00 \u00b1 0.00 % | stable_rps | 0 of 1 |" in lines
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert list(rows[0])[7:18] == [
        *("num_seeds", "seeds", "accuracy", "accuracy_std", "accuracy_half_width"),
        *("test/bpb", "test/bpb_std", "test/bpb_half_width"),
        *("ratio", "val_accuracy", "val/bpb"),
    ]
    values = [(row["accuracy"], row["val_accuracy"], row["test/bpb"]) for row in rows]
    assert values[0] == ("0.8", "0.8", "")
    assert values[2] == ("", "", "2.3")


def test_lines_of_two_tasks_are_read_back_without_loss(mixed):
    runs, _ = read([mixed])
    Path("runs.jsonl").write_text(to_run_lines(Comparison(tuple(runs))))
    assert read(["runs.jsonl"]) == (runs, [])


def test_lines_of_accuracies_are_as_before_there_were_others(mixed):
    runs, _ = read([mixed])
    lines = [json.loads(line) for line in to_run_lines(Comparison(tuple(runs))).splitlines()]
    (old, *_), (new, *_) = (
        [line for line in lines if line["setting"]["data"] == data]
        for data in ("digits", "shakespeare")
    )
    assert old["setting"] == {"data": "digits", "backbone": "mlp"}
    assert (old["accuracy"], old["val_accuracy"]) == (0.8, 0.8)
    assert new["setting"]["primary"] == language_result()["primary"]
    assert (new["test/bpb"], new["val/bpb"]) == (2.3, 2.4)
    assert not {"test", "val", "accuracy"} & new.keys()


def test_figures_name_the_metric_and_enlarge_what_is_near_the_best(mixed):
    runs = [run for run in read([mixed])[0] if run.setting == LANGUAGE and run.bits == 32]
    with house_style():
        plane = draw_plane(points(runs, AXES["ratio"]), AXES["ratio"], LOOKS, note="one")
        memory = draw_memory(runs, common_request(runs), LOOKS)
        curves = draw_curves(runs, common_request(runs), LOOKS)
    assert plane.get_suptitle() == "shakespeare, gpt: test bits per byte over ratio (one)"
    near, whole = plane.axes
    for axes in (near, whole):
        assert axes.get_ylabel() == "test bits per byte (lower is better)"
    assert near.get_ylim() == pytest.approx((2.3 - 0.023, 2.3 + 0.46 + 0.023))
    assert (near.get_title(), whole.get_title()) == ("near the best", "all")
    assert near.get_xlabel() == whole.get_xlabel() != ""
    low, high = whole.get_ylim()
    assert low < 2.3 < 3.9 < high
    front = next(line for line in whole.get_lines() if line.get_label() == "Pareto front")
    assert list(front.get_ydata()) == pytest.approx([2.415, 2.3])
    texts = [text.get_text() for text in memory.axes[0].texts]
    assert texts == ["2.300", "3.915", "2.415"]
    assert "with test bits per byte" in memory.get_suptitle()
    titles = ["validation bits per byte (lower is better)", "training loss"]
    assert [axes.get_title() for axes in curves.axes] == titles
