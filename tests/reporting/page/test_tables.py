"""Tables, and the plots at one ratio."""

from statistics import fmean, stdev

import pytest

from memfold.reporting.records import Comparison, Curve
from memfold.reporting.statistics import common_request
from reporting.page.comparisons import NAMES, SMALL, one_run, realistic
from reporting.page.looking import column, drawn, rows, toggle, traces

DASH = "\u2013"


def test_the_table_has_mean_spread_and_seeds_and_says_what_is_missing(open_page):
    accuracies = ((1, 0.91), (2, 0.92), (3, 0.94))
    dense = [one_run(seed=seed, accuracy=a, peak_bytes=7) for seed, a in accuracies]
    snip = one_run("snip", ratio=0.1, accuracy=0.85, peak_bytes=None)
    mag = one_run("mag", ratio=0.1, accuracy=0.8, peak_bytes=5)
    page = open_page(Comparison((*dense, snip, mag)))
    assert column(page, "method") == ["dense", "snip", "mag"]
    spread = 100 * stdev(accuracy for _, accuracy in accuracies)
    assert column(page, "y") == [f"92.3 \u00b1 {spread:.1f}", "85.0", "80.0"]
    assert column(page, "seeds") == ["3", "1", "1"]
    assert column(page, "order") == ["1", "0.1", "0.1"]
    assert column(page, "stored_bytes")[0] == f"{dense[0].stored_bytes:,}"
    # What is missing comes last, whatever the direction.
    assert page.locator("#table td.best").all_inner_texts() == ["85.0"]
    button = page.locator("#table th[data-key=peak_bytes] button")
    button.click()
    assert column(page, "peak_bytes") == ["7 B", "5 B", DASH]
    button.click()
    assert column(page, "peak_bytes") == ["5 B", "7 B", DASH]
    page.select_option("#axis", "peak_bytes")
    assert set(drawn(page)) == {"dense", "mag"}
    assert "Without a value here: snip." in page.locator("#plane-note").inner_text()


def test_trainings_have_a_column_and_an_axis_where_there_are_several(open_page):
    dense, mag = one_run(), one_run("mag", ratio=0.1, accuracy=0.8)
    page = open_page(Comparison((dense, mag)))
    assert page.locator("#table th[data-key=trainings]").count() == 0
    assert page.locator("#axis option[value=trainings]").count() == 0
    tickets = one_run("ltr", ratio=0.1, accuracy=0.85, fit_seconds=600.0)
    page = open_page(Comparison((dense, mag, tickets)))
    assert column(page, "trainings") == ["1", "12", "1"]
    page.select_option("#axis", "trainings")
    assert set(drawn(page)) == {"dense", "mag", "ltr"}
    hover = "() => document.getElementById('plane').data.flatMap((trace) => trace.hovertext ?? [])"
    texts = [text for text in page.evaluate(hover) if "ltr" in text]
    assert all("time 600 s (12 trainings)" in text for text in texts)
    assert texts


def test_a_click_on_a_header_sorts(small_page):
    header = small_page.locator("#table th[data-key=stored_bytes]")
    accuracy = small_page.locator("#table th[data-key=y]")

    def values():
        return [int(cell.replace(",", "")) for cell in column(small_page, "stored_bytes")]

    assert accuracy.get_attribute("aria-sort") == "descending"
    header.get_by_role("button").click()
    assert values() == sorted(values(), reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    assert accuracy.get_attribute("aria-sort") == "none"
    assert header.get_by_label("sorted descending").inner_text() == "\u25bc"
    assert accuracy.get_by_label("not sorted").count() == 1
    small_page.keyboard.press("Enter")  # the header keeps the focus
    assert values() == sorted(values())
    assert header.get_attribute("aria-sort") == "ascending"
    small_page.locator("#table th[data-key=method] button").click()
    assert column(small_page, "method") == sorted(column(small_page, "method"))
    accuracy.get_by_role("button").click()


def test_all_columns_fit_on_a_laptop(open_page):
    # As wide as 1280 pixels without what two scroll bars take.
    page = open_page(realistic(all_bits=(32,)), viewport={"width": 1250, "height": 800})
    box = page.locator(".scroll", has=page.locator("#table"))
    assert box.evaluate("node => node.scrollWidth <= node.clientWidth")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    hint = "node => getComputedStyle(node, '::before').content"
    assert box.evaluate(hint) == "none"
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("() => document.querySelector('#table').parentElement.matches('.wide')")
    assert "scroll for more columns" in box.evaluate(hint)


def test_wins_and_ties(open_page):
    accuracies = {"snip": (0.80, 0.81), "mag": (0.805, 0.806), "rand": (0.5, 0.501)}
    runs = tuple(
        one_run(method, ratio=0.1, seed=seed, accuracy=accuracy)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    )
    page = open_page(Comparison(runs))
    assert rows(page, "#wins .best")[0][:2] == ["0.1", "tie of 2"]
    assert rows(page, "#wins .duels") == [
        ["mag", DASH, "1 / 0 / 0", "0 / 1 / 0"],
        ["rand", "0 / 0 / 1", DASH, "0 / 0 / 1"],
        ["snip", "0 / 1 / 0", "1 / 0 / 0", DASH],
    ]
    toggle(page, "mag")
    assert "1 hidden" in page.locator("#wins .best").inner_text()
    assert rows(page, "#wins .duels") == [
        ["rand", DASH, "0 / 0 / 1"],
        ["snip", "1 / 0 / 0", DASH],
    ]


def test_curves_and_densities_are_means_over_seeds_at_the_ratio_that_is_chosen(open_page):
    curves = [
        {"val/acc": Curve((10, 20, 30), (0.1, 0.3, 0.5)), "train/loss": Curve((10,), (2.0,))},
        {"val/acc": Curve((10, 30), (0.2, float("nan")))},
    ]
    kept = [{"a.weight": 0.2, "b.weight": 0.0}, {"a.weight": 0.4, "b.weight": 0.0}]
    snip = [
        one_run("snip", ratio=0.1, seed=seed, curves=curves[seed], densities=kept[seed])
        for seed in (0, 1)
    ]
    low = one_run("snip", ratio=0.01, curves={"val/acc": Curve((10,), (0.4,))})
    packed = one_run("snip", ratio=0.01, bits=8)
    dense = one_run(curves={"val/acc": Curve((10, 20), (0.6, 0.7))})
    page = open_page(Comparison((*snip, low, packed, dense)))

    def found():
        return {trace["method"]: trace["y"] for trace in traces(page, "curves", "curve")}

    assert found() == {"snip": [pytest.approx(15), None, None], "dense": [60, 70]}
    (density,) = traces(page, "densities", "density")
    assert (density["x"], density["y"]) == (["a", "b"], [pytest.approx(30), None])
    assert "Nothing at all is kept of b.weight (snip)" in page.inner_text("#densities-note")
    page.select_option("#ratio", "0.01")
    assert found() == {"snip": [40], "dense": [60, 70]}
    assert "No pruned method" in page.inner_text("#densities")
    page.select_option("#ratio", "0.1")
    page.select_option("#metric", "train/loss")
    assert found() == {"snip": [2]}


def test_the_page_opens_at_the_ratio_of_the_figures(open_page):
    runs = realistic(methods=("mag", "rand"), all_bits=(32, 8), seeds=(1,)).runs
    page = open_page(Comparison(runs))
    assert page.input_value("#ratio") == "0.03"
    request = common_request(runs)
    assert request == ("ratio", 0.03)
    mag = next(run for run in runs if run.method == "mag" and run.request == request)
    bars = traces(page, "memory", "bars")[0]
    assert dict(zip(bars["y"], bars["x"], strict=True))["mag"] == mag.peak_bytes


def test_memory_bars_carry_their_numbers(small_page):
    peak, state = traces(small_page, "memory", "bars")
    assert (peak["key"], state["key"]) == ("peak_bytes", "train_state_bytes")
    assert set(peak["y"]) == NAMES
    snip = [run for run in SMALL.runs if (run.method, run.requested_ratio) == ("snip", 0.1)]
    mean = fmean(run.peak_bytes for run in snip if run.bits == 32)
    assert dict(zip(peak["y"], peak["x"], strict=True))["snip"] == mean
    assert f"{mean / 1e6:.3g} MB" in small_page.locator("#memory").text_content()
