"""The page where the metric is not an accuracy, and where less of it is better."""

import pytest

from memfold.reporting.statistics import AXES, pareto_front, points
from reporting.page.comparisons import LANGUAGE, TWO_TASKS
from reporting.page.looking import column, drawn, front, hover, rows, traces

RUNS = [run for run in TWO_TASKS.runs if run.setting == LANGUAGE]


def test_names_units_and_direction_are_on_the_page(tasks_page):
    read = "document.getElementById('plane').layout.yaxis.title.text"
    tabs = tasks_page.get_by_role("tab")
    assert tabs.all_inner_texts() == [
        "shakespeare \u00b7 gpt \u00b7 bits per byte",
        "fashion_mnist \u00b7 cnn",
    ]
    assert tasks_page.evaluate(read) == "test bits per byte (lower is better)"
    assert tasks_page.inner_text("#plane-title") == "Bits per byte over stored bytes"
    head = tasks_page.inner_text("#table th[data-key=y]")
    assert head == "bits per byte (lower is better)\u25b2"
    assert "has lower bits per byte for less" in tasks_page.inner_text("#key")
    assert tasks_page.locator("#plane .annotation-text").text_content() == "dense2.200"
    said = hover(tasks_page, "stable_rps")
    assert "bits per byte 2.500 \u00b1 0.006 (2 runs)" in said
    assert "seed 1: 2.496, " in said
    tabs.nth(1).click()
    assert tasks_page.evaluate(read) == "test accuracy, %"
    assert tasks_page.inner_text("#plane-title") == "Accuracy over stored bytes"
    assert tasks_page.inner_text("#table th[data-key=y]") == "accuracy, %\u25bc"
    assert column(tasks_page, "y") == ["80.0 \u00b1 0.0"]


def test_values_and_the_front_stand_as_they_are(tasks_page):
    found = points(RUNS, AXES["stored_bytes"])
    assert drawn(tasks_page)["mag"] == [
        (p.x, pytest.approx(p.y)) for p in found if p.method == "mag"
    ]
    assert front(tasks_page) == [(p.x, pytest.approx(p.y)) for p in pareto_front(found)]
    assert {p.method for p in pareto_front(found)} == {"dense", "stable_rps"}


def test_what_is_near_the_best_is_above_it(tasks_page):
    read = "document.getElementById('plane')._fullLayout.yaxis.range"
    assert not tasks_page.is_checked("#near")
    assert tasks_page.evaluate(read)[1] > 5
    tasks_page.check("#near")
    assert tasks_page.evaluate(read) == pytest.approx([2.2 - 0.044, 2.2 + 0.44])
    assert '2 points above ("near the best" is on): snip.' in tasks_page.inner_text("#plane-note")


def test_the_best_comes_first_and_wins(tasks_page):
    values = column(tasks_page, "y")
    assert values == sorted(values)
    assert column(tasks_page, "method")[0] == "dense"
    head = tasks_page.locator("#table th[data-key=y]")
    assert head.get_attribute("aria-sort") == "ascending"
    winner = rows(tasks_page, "#wins .best")[0]
    best = "stable_rps 2.400 \u00b1 0.006"
    assert [cell.strip() for cell in winner] == ["0.1", "win", "0 of 2", best]
    assert rows(tasks_page, "#wins .duels")[0][2:] == ["2 / 0 / 0", "0 / 0 / 2"]
    head.get_by_role("button").click()
    assert column(tasks_page, "y") == sorted(values, reverse=True)
    tasks_page.get_by_role("tab").nth(1).click()
    assert head.get_attribute("aria-sort") == "descending"
    tasks_page.get_by_role("tab").first.click()
    assert column(tasks_page, "y") == values
    for key in ("bits", "y"):
        tasks_page.locator(f"#table th[data-key={key}] button").click()
    assert column(tasks_page, "y") == values


def test_the_curve_of_the_metric_is_shown_first_with_its_unit(tasks_page):
    read = "document.getElementById('curves').layout.yaxis.title.text"

    def found():
        return {tuple(trace["y"]) for trace in traces(tasks_page, "curves", "curve")}

    assert tasks_page.input_value("#metric") == "val/bpb"
    assert (tasks_page.evaluate(read), found()) == ("val/bpb, bits per byte", {(4, 2.5)})
    tasks_page.select_option("#metric", "val/acc")
    assert (tasks_page.evaluate(read), found()) == ("val/acc", {(0.3, 0.5)})
