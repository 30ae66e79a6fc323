"""Networks of several kinds in one setting."""

import csv
import io
from pathlib import Path

import pytest

from memfold.reporting.drawing import house_style
from memfold.reporting.page_data import page_data
from memfold.reporting.planes import draw_plane
from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Network, Setting
from memfold.reporting.report_command import main
from memfold.reporting.run_lines import to_run_lines
from memfold.reporting.statistics import AXES, common_request, points, win_matrix
from memfold.reporting.styles import styles
from memfold.reporting.tables import to_csv, to_markdown
from reporting.fabricated import result, write_run

BYTES = AXES["stored_bytes"]
LENET = {"backbone.hidden_widths": [300, 100], "backbone.pooling": 1}


def write(name, accuracies, strategy="small", **changes):
    """Write runs of one point with the seeds 1, 2, ..., one for each accuracy."""
    for seed, accuracy in enumerate(accuracies, start=1):
        command = f"python train.py {name} seed={seed}"
        contents = result(strategy, 0.1, seed, accuracy, command=command, **changes)
        write_run(Path("runs") / f"{name}-{seed}", contents)


def of_bytes(stored, dense, **changes):
    """What a result says of a run with `budget_bytes=8000`."""
    return {
        "compression__requested_ratio": None,
        "compression__budget_bytes": 8_000,
        "compression__ratio": stored / dense,
        "memory__stored_bytes": stored,
        "memory__dense_bytes": dense,
        **changes,
    }


@pytest.fixture
def mixed(here):
    """A LeNet, other perceptrons and a convolutional network, in files of 8,000 bytes."""
    lenet, pooled = {"recipe": LENET}, {"recipe": {**LENET, "backbone.pooling": 4}}
    write("lenet", (0.9, 0.91, 0.92), "dense", memory__stored_bytes=100_000, **lenet)
    write("rps", (0.8, 0.82, 0.81), "stable_rps", **of_bytes(8_000, 100_000, **lenet))
    write("narrow", (0.5, 0.51, 0.52), **of_bytes(7_900, 100_000, **lenet))
    write("pooled", (0.7, 0.72, 0.71), **of_bytes(7_950, 40_000, **pooled))
    cnn = {"backbone": "cnn", "recipe": {"backbone.width": 32}}
    write("cnn", (0.85, 0.87, 0.86), **of_bytes(7_990, 50_000, **cnn))
    whole = {"memory__dense_bytes": 50_000, "memory__stored_bytes": 50_000}
    write("whole", (0.95,), "dense", **whole, **cnn)
    return here


def joined(*folders):
    runs, problems = read(folders or ["runs"], is_joined=True)
    return Comparison(tuple(runs), tuple(problems))


def test_other_networks_stand_in_the_names_of_methods(mixed):
    found = joined()
    assert found.problems == ()
    assert {run.setting for run in found.runs} == {Setting("digits", "mlp")}
    methods = {run.method: run.network for run in found.runs}
    cnn, pooled = Network("cnn", "cnn", 50_000), Network("mlp", "mlp (pooling=4)", 40_000)
    assert methods == {
        "dense": None,
        "stable_rps": None,
        "small": None,
        "small, mlp (pooling=4)": pooled,
        "small, cnn": cnn,
        "dense, cnn": cnn,
    }
    apart = read(["runs"])[0]
    names = {"mlp (100,000 bytes)", "mlp (40,000 bytes)", "cnn"}
    assert {run.setting.backbone for run in apart} == names
    assert {run.method for run in apart} == {"dense", "stable_rps", "small"}


def test_networks_whose_options_do_not_tell_them_apart_are_told_by_their_bytes(here):
    """Older results do not say them; of what one says, what no other one says tells nothing."""
    write("a", (0.8, 0.8))
    write("b", (0.7,), memory__dense_bytes=40_000)
    write("c", (0.6,), memory__dense_bytes=30_000, recipe={"backbone.pooling": 4})
    write("d", (0.6,), memory__dense_bytes=20_000, recipe={"backbone.pooling": 2})
    write("e", (0.6,), memory__dense_bytes=10_000, recipe={"backbone.pooling": 2})
    assert {run.folder[5]: run.method for run in joined().runs} == {
        "a": "small",
        "b": "small, mlp (40,000 bytes)",
        "c": "small, mlp (pooling=4)",
        "d": "small, mlp (20,000 bytes)",
        "e": "small, mlp (10,000 bytes)",
    }


def test_all_options_of_networks_that_share_another_name_are_said(here):
    write("a", (0.8, 0.8))
    for width in (8, 16):
        recipe = {"backbone.width": width, "backbone.widths": None}
        write(f"c{width}", (0.7,), backbone="cnn", recipe=recipe, memory__dense_bytes=100 * width)
    found = {run.method for run in joined().runs}
    assert found == {"small", "small, cnn (width=8)", "small, cnn (width=16)"}


def test_lines_of_a_joined_report_can_be_drawn_apart_and_joined_anew(mixed):
    (mixed / "joined.jsonl").write_text(to_run_lines(joined()))
    assert joined("joined.jsonl") == joined()
    assert read(["joined.jsonl"]) == read(["runs"])
    apart = to_run_lines(Comparison(tuple(read(["runs"])[0])))
    assert "network" not in apart
    (mixed / "apart.jsonl").write_text(apart)
    assert joined("apart.jsonl") == joined()
    # The convolutional network has the most runs now.
    write("more", [0.5] * 12, backbone="cnn", memory__dense_bytes=50_000)
    found = joined("joined.jsonl", "runs").runs
    assert {run.setting.backbone for run in found} == {"cnn"}
    assert {run.dense_bytes for run in found} == {50_000}
    assert "small, mlp (pooling=4)" in {run.method for run in found}


def test_stored_ratios_are_those_of_the_dense_model_of_the_setting(mixed):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(joined())))}
    assert {method: float(row["stored_ratio"]) for method, row in rows.items()} == {
        "dense": 1,
        "stable_rps": 0.08,
        "small": 0.079,
        "small, mlp (pooling=4)": pytest.approx(0.0795),
        "small, cnn": pytest.approx(0.0799),
        "dense, cnn": 0.5,
    }
    assert rows["small, cnn"]["backbone"] == "cnn"
    assert rows["small, mlp (pooling=4)"]["backbone"] == "mlp (pooling=4)"
    assert rows["small"]["backbone"] == "mlp"


def test_equal_bytes_compare_all_networks(mixed):
    (matrix,) = win_matrix(joined().runs)
    (cell,) = matrix.cells
    assert cell.budget_bytes == 8_000
    order = ["small, cnn", "stable_rps", "small, mlp (pooling=4)", "small"]
    assert [point.method for point in cell.points] == order
    assert cell.separated == ("small",)  # pairs with the others all differ by the same: no test
    assert matrix.duels["small, cnn", "small"].wins == 1


def test_ratios_of_two_networks_are_not_compared(here):
    for name, backbone in (("a", "mlp"), ("b", "mlp"), ("c", "cnn"), ("d", "cnn")):
        method = "mag" if name in "ac" else "snip"
        seeds = (0.8, 0.81, 0.79) if backbone == "mlp" else (0.9, 0.91)
        write(name, seeds, method, backbone=backbone)
    found = joined()
    (matrix,) = win_matrix(found.runs)
    assert [[point.method for point in cell.points] for cell in matrix.cells] == [
        ["mag", "snip"],
        ["mag, cnn", "snip, cnn"],
    ]
    assert common_request(found.runs) == ("ratio", 0.1)
    assert {point.method for point in points(found.runs, AXES["ratio"])} == {"mag", "snip"}
    text = to_markdown(found, "Two networks")
    assert "| 0.1 of cnn | mag, cnn: " in text
    assert text.count("| **80.00") == text.count("| **90.50") == 2  # the best of each
    rows = page_data(found)["settings"][0]["rows"]
    assert {row["method"]: row["ratio"] for row in rows}["mag, cnn"] == "0.1 of cnn"


def test_only_the_dense_model_of_the_setting_is_a_line(mixed):
    found = joined()
    looks = styles(run.method for run in found.runs)
    with house_style():
        figure = draw_plane(points(found.runs, BYTES), BYTES, looks, note="32 bits")
    for axes in figure.axes:
        levels = [line for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
        assert [line.get_ydata()[0] for line in levels] == [pytest.approx(0.91)]
    methods = {m["name"]: m for m in page_data(found)["settings"][0]["methods"]}
    dense = {name for name, method in methods.items() if method["isDense"]}
    assert dense == {"dense", "dense, cnn"}
    assert {name for name in dense if methods[name]["isOfSetting"]} == {"dense"}
    assert looks["small, cnn"].colour == looks["small"].colour
    assert looks["small, cnn"].marker != looks["small"].marker


def test_networks_neither_repeat_nor_average_each_other_but_share_their_data(here):
    write("a", (0.8, 0.8))
    write("b", (0.7,), backbone="cnn", training={"epochs": 4.0, "steps": 80})
    assert len(joined().runs) == 3
    assert joined().problems == ()
    write("c", (0.7,), backbone="vit", training={"epochs": 2.0, "steps": 44})
    write("d", (0.6,), backbone="cnn")
    reasons = sorted(problem.reason for problem in joined().problems)
    assert [reason.partition(":")[0] for reason in reasons] == [
        "repeats runs/b-1, with test accuracy 0.6000 where that has 0.7000 (small 0.1, seed 1); "
        "left out",
        "runs differ in the optimizer steps of an epoch, so in training data or batch size",
    ]


def test_the_command_draws_published_curves_of_the_network_of_the_setting(mixed, capsys):
    lines = ("method,dataset,model,ratio,accuracy", "snip,digits,mlp,0.1,0.8")
    (mixed / "published.csv").write_text("\n".join(lines))
    arguments = ["runs", "--out", "report", "--reference", "published.csv"]
    assert main([*arguments, "--join-backbones"]) == 0
    assert capsys.readouterr().out.startswith("16 runs of 6 methods in 1 setting ")
    assert "### Published" in (mixed / "report" / "table.md").read_text()
    assert read(["report/runs.jsonl"], is_joined=True) == read(["runs"], is_joined=True)
