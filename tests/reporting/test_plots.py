import io
from dataclasses import replace

import pytest
from PIL import Image

from memfold.reporting.details import draw_curves, draw_densities, draw_memory
from memfold.reporting.drawing import house_style
from memfold.reporting.planes import draw_plane
from memfold.reporting.plots import draw
from memfold.reporting.reading import read
from memfold.reporting.records import Comparison, Curve, Reference, Setting
from memfold.reporting.statistics import (
    AXES,
    at_most_bits,
    common_request,
    pareto_front,
    points,
)
from memfold.reporting.styles import styles
from reporting.fabricated import language_result, packed, result, write_run
from reporting.page.comparisons import one_run

CURVE = {"val/acc": Curve((1, 2), (0.1, 0.2))}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"step": n, "val/acc": 0.1 * n, "density/a": 0.1, "density/b": 0} for n in range(5)]
    for name, quality in (("stable_rps", 0.8), ("mag", 0.6)):
        for ratio in (0.1, 0.01):
            for seed in (1, 2):
                accuracy = quality + 0.1 * ratio + 0.01 * seed
                one = result(name, ratio, seed, accuracy)
                run = write_run(folder / f"{name}-{ratio}-{seed}", one, rows)
                write_run(run / "packed" / "8", packed(one, 8, accuracy))
    write_run(folder / "dense", result("dense", accuracy=0.95))
    other = language_result("dense", backbone="pkg.mod.Net", memory__peak_bytes=None)
    write_run(folder / "other", other)
    runs, problems = read([folder])
    assert problems == []
    references = (Reference(Setting("digits", "mlp"), "snip", 0.1, 0.7),)
    return Comparison(tuple(runs), (), references)


def test_every_setting_gets_the_figures_that_it_has_values_for(comparison, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    files = draw(comparison, tmp_path)
    names = {file.name for file in files}
    figures = ("stored_bytes", "ratio", "peak_bytes", "fit_seconds", "stored_bytes-best_bits")
    figures += ("memory", "curves", "density")
    others = ("stored_bytes", "ratio", "fit_seconds", "memory")
    expected = [f"digits-mlp-{name}" for name in figures]
    expected += [f"shakespeare-pkg.mod.Net-bits_per_byte-{name}" for name in others]
    assert names == {f"{name}.{suffix}" for name in expected for suffix in ("png", "pdf")}
    assert {p.name for p in tmp_path.iterdir()} == names | {"mine.txt"}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.width >= 1200
    for file in tmp_path.glob("*.pdf"):
        contents = file.read_bytes()
        assert contents.startswith(b"%PDF")
        assert b"/TrueType" in contents or b"/CIDFontType2" in contents
        assert b"/Type3" not in contents


def test_the_figures_show_one_ratio_and_every_training_once():
    """Of a method without a common ratio, of what was packed later, and in every figure."""
    ratios = (0.3, 0.1, 0.03)
    kept = {"stem": 0.2, "head": 0.9}
    runs = [one_run("stable_rps", ratio=ratio, curves=CURVE) for ratio in ratios]
    runs += [one_run("mag", ratio=r, densities=kept, curves=CURVE) for r in (*ratios, 0.01)]
    runs += [one_run("mag", ratio=r, bits=8, peak_bytes=1) for r in (*ratios, 0.01)]
    request, trained, looks = common_request(runs), at_most_bits(runs), styles(["mag"])
    looks |= styles(["stable_rps"])
    assert [run.bits for run in trained] == [32] * 7
    with house_style():
        memory = draw_memory(trained, request, looks)
        curves = draw_curves(trained, request, looks)
        density = draw_densities(trained, request, looks)
    for figure in (memory, curves, density):
        assert figure.get_suptitle().endswith("(ratio 0.1)")
    assert [t.get_text() for t in density.axes[0].get_xticklabels()] == ["stem", "head"]
    with house_style():
        alone = draw_densities([run for run in trained if run.ratio < 0.02], request, looks)
    assert alone.get_suptitle().endswith("(ratio 0.01)")


def test_there_is_no_accuracy_above_all_or_below_nothing():
    runs = [one_run("mag", ratio=0.1, seed=seed, accuracy=seed - 1.0) for seed in (1, 2)]
    axis = AXES["ratio"]
    with house_style():
        figure = draw_plane(points(runs, axis), axis, styles(["mag"]), note="one")
    assert figure.axes[-1].get_ylim() == (-0.02, 1.02)


def test_ratios_that_nobody_asked_for_have_ticks_beside_them():
    runs = [
        replace(one_run("mag", ratio=None, budget_bytes=size), ratio=ratio)
        for size, ratio in ((1_000, 0.0588), (2_000, 0.07), (3_000, 0.18))
    ]
    axis = AXES["ratio"]
    with house_style():
        figure = draw_plane(points(runs, axis), axis, styles(["mag"]), note="one")
    axes = figure.axes[-1]
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def test_methods_near_the_best_have_a_panel_where_others_have_collapsed():
    runs = [one_run("mag", ratio=r, accuracy=a) for r, a in ((0.1, 0.88), (0.01, 0.4))]
    axis = AXES["ratio"]
    for shown, num_panels in ((runs, 2), (runs[:1], 1)):
        with house_style():
            figure = draw_plane(points(shown, axis), axis, styles(["mag"]), note="one")
        assert len(figure.axes) == num_panels
        low, high = figure.axes[0].get_ylim()
        assert low < 0.88 < high
        assert num_panels == 1 or (low > 0.7 and high < 0.9)


def test_a_name_with_dollars_is_no_formula():
    runs = [one_run("mag (note=$x_{)", ratio=0.1, setting=Setting("a$b", "c_{$"))]
    axis = AXES["ratio"]
    with house_style():
        figure = draw_plane(points(runs, axis), axis, styles([runs[0].method]), note="one")
        figure.savefig(io.BytesIO())
    assert figure.get_suptitle().startswith("a$b, c_{$:")
    assert figure.legends[0].get_texts()[0].get_text() == runs[0].method


def test_a_plane_has_a_line_per_method_and_a_ring_per_point_of_the_front(comparison):
    runs = [run for run in comparison.runs if run.setting.backbone == "mlp" and run.bits == 32]
    axis = AXES["ratio"]
    found = points(runs, axis)
    with house_style():
        looks = styles(["dense", "stable_rps", "mag", "snip"])
        figure = draw_plane(
            found, axis, looks, note="32 bits a value", references=comparison.references
        )
    *_, axes = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    containers = {container.get_label(): container for container in axes.containers}
    assert set(containers) == {"dense", "stable_rps", "mag"}
    for method, container in containers.items():
        line = container.lines[0]
        assert line.get_color() == looks[method].colour
        assert list(line.get_xdata()) == [p.x for p in found if p.method == method]
        assert list(line.get_ydata()) == [p.y for p in found if p.method == method]
    assert list(lines["Pareto front"].get_xdata()) == [p.x for p in pareto_front(found)]
    assert lines["snip, published"].get_linestyle() == "--"
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dense", "mag", "snip, published", "stable_rps", "Pareto front"]
