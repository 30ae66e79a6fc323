"""The plane, and the switches that change it."""

from dataclasses import replace
from statistics import fmean

import pytest
from playwright.sync_api import expect

from memfold.reporting.records import Comparison, Network, Reference
from memfold.reporting.statistics import AXES, at_best_bits, pareto_front, points
from reporting.page.comparisons import DIGITS, FASHION, NAMES, SMALL, one_run, realistic
from reporting.page.looking import (
    by_method,
    column,
    drawn,
    expected,
    front,
    hover,
    place,
    scale,
    toggle,
    traces,
)


def test_a_line_of_means_for_each_method(small_page):
    assert drawn(small_page) == expected(SMALL, "stored_bytes")
    assert set(drawn(small_page)) == NAMES
    singles = traces(small_page, "plane", "runs")
    numbers = {trace["method"]: len(trace["x"]) for trace in singles}
    assert numbers == {"dense": 3, "stable_rps": 6, "hashednet": 6, "snip": 6}
    small_page.uncheck("#single")
    assert traces(small_page, "plane", "runs") == []


def test_the_plane_can_show_what_is_near_the_best(small_page):
    read = "() => document.getElementById('plane')._fullLayout.yaxis.range"
    whole = small_page.evaluate(read)
    small_page.check("#near")
    best = max(p.y for p in points(SMALL.runs, AXES["stored_bytes"]) if p.bits == 32)
    assert small_page.evaluate(read) == pytest.approx([100 * best - 10, 100 * best + 1])
    assert drawn(small_page) == expected(SMALL, "stored_bytes")
    small_page.uncheck("#near")
    assert small_page.evaluate(read) == pytest.approx(whole)


def test_the_page_opens_near_the_best_where_most_points_crowd_there(open_page):
    accuracies = ((0.3, 0.9), (0.1, 0.89), (0.03, 0.88), (0.01, 0.3))
    runs = (
        one_run(accuracy=0.9),
        *(one_run(m, ratio=ratio, accuracy=a) for m in ("mag", "rand") for ratio, a in accuracies),
        *(one_run("mag", ratio=r, accuracy=a, setting=DIGITS) for r, a in accuracies[2:]),
    )
    page = open_page(Comparison(runs))
    read = "() => document.getElementById('plane')._fullLayout.yaxis.range"
    assert page.is_checked("#near")
    assert page.evaluate(read) == pytest.approx([80, 91])
    note = page.locator("#plane-note")
    assert '2 points below ("near the best" is on): mag, rand.' in note.inner_text()
    page.uncheck("#near")
    assert page.evaluate(read)[0] < 30
    assert "below" not in note.inner_text()
    page.get_by_role("tab", name="digits").click()
    assert not page.is_checked("#near")
    page.get_by_role("tab", name="fashion_mnist").click()
    assert page.is_checked("#near")


def ticks(page, plot):
    return page.locator(f"#{plot} .xtick text").all_text_contents()


def test_bytes_have_units_on_every_axis_also_when_zoomed(small_page):
    assert "100 kB" in ticks(small_page, "plane")
    zoom = "range => Plotly.relayout('plane', {'xaxis.range': range})"
    small_page.evaluate(zoom, [4.6, 4.8])  # powers of ten
    assert ticks(small_page, "plane") == ["40 kB", "45 kB", "50 kB", "55 kB", "60 kB"]
    small_page.evaluate("Plotly.relayout('plane', {'xaxis.autorange': true})")
    assert "100 kB" in ticks(small_page, "plane")
    small_page.select_option("#axis", "peak_bytes")
    assert all(tick.endswith(" MB") for tick in ticks(small_page, "plane"))
    assert len(set(ticks(small_page, "plane"))) >= 3
    small_page.evaluate(zoom, [91_001_000, 91_002_000])
    assert ticks(small_page, "plane")[:2] == ["91.001 MB", "91.0012 MB"]
    assert {tick[-2:] for tick in ticks(small_page, "memory")} == {" B", "MB"}
    small_page.select_option("#axis", "ratio")
    assert ticks(small_page, "plane") == ["0.01", "0.1", "1"]


def test_the_dense_accuracy_is_a_line_with_its_number(small_page):
    mean = fmean(run.test for run in SMALL.runs if run.is_dense and run.bits == 32)
    label = small_page.locator("#plane .annotation-text")
    assert label.text_content() == f"dense{100 * mean:.1f} %"  # on two lines
    toggle(small_page, "dense")
    assert label.count() == 0


def test_the_dense_model_of_another_network_is_a_point_and_no_line(open_page):
    cnn = Network("cnn", "cnn", 50_000)
    other = one_run("dense, cnn", strategy="dense", network=cnn, stored_bytes=50_000, accuracy=0.95)
    page = open_page(Comparison((one_run(accuracy=0.9), other)))
    assert page.locator("#plane .annotation-text").text_content() == "dense90.0 %"
    assert set(drawn(page)) == {"dense", "dense, cnn"}
    assert set(column(page, "order")) == {"1", "1 of cnn"}
    toggle(page, "dense, cnn")
    assert page.locator("#plane .annotation-text").count() == 1


def test_the_dense_label_is_beside_the_points(small_page):
    text = small_page.locator("#plane .annotation-text").bounding_box()
    drawing = small_page.locator("#plane .main-svg").first.bounding_box()
    area = small_page.locator("#plane .nsewdrag").bounding_box()
    assert text["x"] >= area["x"] + area["width"]
    assert text["x"] + text["width"] <= drawing["x"] + drawing["width"]


def test_a_click_hides_a_method_everywhere(small_page):
    assert small_page.locator("#shown").inner_text() == "(4 of 4 shown)"
    toggle(small_page, "snip")
    assert set(drawn(small_page)) == NAMES - {"snip"}
    for plot, role in (("plane", "runs"), ("curves", "curve"), ("densities", "density")):
        assert "snip" not in {trace["method"] for trace in traces(small_page, plot, role)}
    assert all("snip" not in trace["y"] for trace in traces(small_page, "memory", "bars"))
    assert set(column(small_page, "method")) == NAMES - {"snip"}
    assert "snip" not in small_page.locator("#wins .duels").inner_text()
    button = small_page.locator("#methods button", has_text="snip")
    assert button.get_attribute("aria-pressed") == "false"
    assert small_page.locator("#shown").inner_text() == "(3 of 4 shown)"
    button.focus()
    small_page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true"
    assert set(drawn(small_page)) == NAMES
    assert "snip" in small_page.locator("#wins .duels").inner_text()
    assert len(traces(small_page, "curves", "curve")) == 4


def test_all_hidden_says_so_and_comes_back(small_page):
    small_page.click("#hide-all")
    assert "No method that is shown" in small_page.locator("#plane").inner_text()
    assert column(small_page, "method") == []
    small_page.click("#show-all")
    assert set(drawn(small_page)) == NAMES
    assert small_page.locator("#plane .empty").count() == 0


def test_the_front_is_that_of_the_methods_shown(small_page):
    shown = [run for run in SMALL.runs if run.bits == 32]
    for hidden in (None, "stable_rps"):
        if hidden:
            toggle(small_page, hidden)
            shown = [run for run in shown if run.method != hidden]
        best = pareto_front(points(shown, AXES["stored_bytes"]))
        assert front(small_page) == [(p.x, pytest.approx(100 * p.y)) for p in best]


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "trainings"])  # all have one
def test_switching_the_axis_changes_the_data_and_its_scale(small_page, axis):
    small_page.select_option("#axis", axis)
    assert drawn(small_page) == expected(SMALL, axis)
    assert scale(small_page) == ("log" if AXES[axis].is_log else "linear")
    small_page.locator("#log").click()
    assert scale(small_page) == ("linear" if AXES[axis].is_log else "log")
    assert drawn(small_page) == expected(SMALL, axis)


def test_switching_the_bits_changes_plot_and_table(small_page):
    options = small_page.locator("#bits option").all_inner_texts()
    assert options == ["32", "8", "best of all"]
    small_page.select_option("#bits", "8")
    assert drawn(small_page) == expected(SMALL, "stored_bytes", bits=8)
    assert set(column(small_page, "bits")) == {"8"}
    small_page.select_option("#bits", "best")
    best = at_best_bits(points(SMALL.runs, AXES["stored_bytes"]))
    assert drawn(small_page) == by_method(best)
    assert sorted(column(small_page, "bits")) == sorted(str(point.bits) for point in best)


def test_pointing_at_a_mean_tells_its_runs(small_page):
    of_snip = [run for run in SMALL.runs if run.method == "snip" and run.bits == 32]
    point = points(of_snip, AXES["stored_bytes"])[0]
    said = hover(small_page, "snip")
    for part in (
        "snip",
        "ratio 0.01, 32 bits",
        f"accuracy {100 * point.y:.1f} \u00b1 {100 * point.y_std:.1f} % (3 runs)",
        f"stored {point.runs[0].stored_bytes:,} bytes",
        *(f"seed {r.seed}: {100 * r.test:.1f} %, {r.folder}" for r in point.runs),
    ):
        assert part in said
    assert "more" not in said


def test_a_single_run_does_not_hide_its_mean(open_page):
    accuracies = (0.801, 0.8, 0.8, 0.8, 0.8, 0.8, 0.799)
    mags = [one_run("mag", ratio=0.1, seed=s, accuracy=a) for s, a in enumerate(accuracies)]
    page = open_page(Comparison((one_run(accuracy=0.1), *mags)))
    said = hover(page, "mag")
    assert "accuracy 80.0 \u00b1 0.1 % (7 runs)" in said
    assert "seed 4: 80.0 %" in said
    assert "seed 5" not in said
    assert said.endswith("and 2 more")


def test_a_single_run_far_from_its_mean_tells_of_itself(open_page):
    mags = [one_run("mag", ratio=0.1, seed=s, accuracy=a) for s, a in ((1, 0.9), (2, 0.7))]
    page = open_page(Comparison((one_run(accuracy=0.1), *mags)))
    page.uncheck("#near")
    hover(page, "mag")
    x, y = place(page, "mag")
    scale = "(() => { const {yaxis} = document.getElementById('plane')._fullLayout;"
    up = page.evaluate(scale + "return yaxis.d2p(90) - yaxis.d2p(80); })()")
    page.mouse.move(x, y + up)
    expect(page.locator("#plane .hovertext")).to_contain_text("one run")
    assert "seed 1, ratio 0.1" in page.locator("#plane .hovertext").text_content()


def test_published_points_answer(open_page):
    page = open_page(Comparison(SMALL.runs, references=(Reference(FASHION, "snip", 0.5, 0.5),)))
    page.select_option("#axis", "ratio")
    page.locator("#plane").scroll_into_view_if_needed()
    page.mouse.move(*place(page, "snip", "published"))
    expect(page.locator("#plane .hovertext")).to_contain_text("snip, published")


def test_an_axis_that_nothing_was_measured_on_is_not_offered(open_page):
    runs = tuple(replace(run, peak_bytes=None, train_state_bytes=None) for run in SMALL.runs)
    page = open_page(Comparison(runs))
    options = page.locator("#axis option").evaluate_all("nodes => nodes.map((n) => n.value)")
    assert options == ["stored_bytes", "ratio", "fit_seconds", "operations"]
    assert "measured memory" in page.locator("#memory").inner_text()


def test_a_logarithm_has_no_place_for_what_took_nothing(open_page):
    runs = tuple(replace(r, fit_seconds=0.0) if r.method == "snip" else r for r in SMALL.runs)
    page = open_page(Comparison(runs))
    page.uncheck("#log")
    page.select_option("#axis", "fit_seconds")
    assert set(drawn(page)) == NAMES
    page.check("#log")
    assert set(drawn(page)) == NAMES - {"snip"}
    assert "Without a value here: snip." in page.inner_text("#plane-note")


def test_there_is_no_accuracy_above_all_or_below_nothing(open_page):
    runs = tuple(one_run("mag", ratio=0.1, seed=seed, accuracy=seed - 1.0) for seed in (1, 2))
    page = open_page(Comparison(runs))
    shown = page.evaluate("document.getElementById('plane').layout.yaxis.range")
    assert shown == [-2, 102]


def test_a_single_point_has_ticks_that_can_be_read(open_page):
    page = open_page(Comparison((one_run(ratio=None, stored_bytes=12_345),)))
    ticks = page.locator("#plane .xtick text").all_text_contents()
    assert ticks == ["2 kB", "5 kB", "10 kB", "20 kB", "50 kB", "100 kB"]


def test_settings_are_never_in_one_picture(open_page):
    other = realistic(methods=("roast",), ratios=(0.1,), setting=DIGITS, all_bits=(32,))
    page = open_page(Comparison(SMALL.runs + other.runs))
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["fashion_mnist \u00b7 cnn", "digits \u00b7 resnet20"]
    assert drawn(page) == expected(SMALL, "stored_bytes")
    tabs.first.focus()
    page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert drawn(page) == expected(other, "stored_bytes")
    assert set(column(page, "method")) == {"dense", "roast"}
    assert page.locator("#methods button").all_inner_texts() == ["dense", "roast"]
    assert page.locator("#wins").inner_text() == ""


def test_published_curves_are_dashed_and_over_the_ratio_only(open_page):
    published = tuple(Reference(FASHION, "snip", ratio, 0.8 + ratio) for ratio in (0.1, 0.01))
    page = open_page(Comparison(SMALL.runs, references=published))
    assert traces(page, "plane", "published") == []
    assert "over the ratio only" in page.inner_text("#plane-note")
    page.select_option("#axis", "ratio")
    (curve,) = traces(page, "plane", "published")
    assert (curve["x"], curve["dash"]) == ([0.01, 0.1], "dash")
    assert curve["y"] == [pytest.approx(81), pytest.approx(90)]
    toggle(page, "snip, published")
    assert traces(page, "plane", "published") == []
    assert set(drawn(page)) == NAMES
