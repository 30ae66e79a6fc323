"""The page as a document: what it says about itself, whatever the names, on any screen."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from memfold.errors import InputError
from memfold.reporting.page import write_page
from memfold.reporting.records import Comparison, Curve, Problem, Reference, Setting
from reporting.page.comparisons import DIGITS, FASHION, METHODS, SMALL, one_run, realistic
from reporting.page.looking import hover, rows

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 1'> &lt; %{x} ${x}"
)


def test_structure_and_names_for_those_who_do_not_see_it(small_page):
    assert small_page.title() == "Comparison"
    assert small_page.locator("html").get_attribute("lang") == "en"
    heads = small_page.locator("h1, h2, h3")
    levels = heads.evaluate_all("nodes => nodes.map((n) => Number(n.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    plots = small_page.locator("[role=figure]")
    assert plots.count() == 4
    assert all(plot.get_attribute("aria-label") for plot in plots.all())
    unnamed = small_page.locator("button, select, input").evaluate_all(
        """nodes => nodes.filter(
          (n) => !n.textContent.trim() && !n.labels?.length && !n.ariaLabel).length"""
    )
    assert unnamed == 0


def test_no_button_sends_the_data_away(small_page):
    titles = small_page.locator("#plane .modebar-btn").evaluate_all(
        "nodes => nodes.map((n) => n.dataset.title)"
    )
    assert sorted(titles) == ["Download plot as a PNG", "Pan", "Reset axes", "Zoom"]


def test_without_scripts_the_reader_is_sent_to_the_table(browser, tmp_path):
    write_page(SMALL, tmp_path / "index.html", title="Comparison")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert "The same numbers are in table.md." in page.locator("header").inner_text()
    assert page.locator("header a").first.get_attribute("href") == "table.md"
    context.close()


def test_problems_are_counted_at_the_top_and_listed(open_page, small_page):
    problems = (Problem("runs/7", "failed: out of memory"), Problem("runs/9", "no result.json"))
    page = open_page(Comparison(SMALL.runs, problems))
    summary = "fashion_mnist \u00b7 cnn, 21 runs, 4 methods"
    assert page.inner_text("#summary") == f"{summary}, 2 problems"
    assert page.locator("#summary a").get_attribute("href") == "#problems"
    assert rows(page, "#problem-list") == [[p.folder, p.reason] for p in problems]
    assert small_page.inner_text("#summary") == f"{summary}, no problems"
    assert small_page.locator("#problem-list").is_hidden()


def test_the_training_stands_above_the_first_plot(open_page):
    recipe = {"optimizer": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9}
    recipe |= {"data.batch_size": 128, "data.train_subset": 5000, "scheduler": "cosine"}
    runs = (
        one_run(recipe=recipe),
        one_run("mag", ratio=0.1, recipe=recipe | {"optimizer.lr": 0.03}),
        one_run("mag", ratio=0.1, command="train.py optimizer.lr=1 seed=3", setting=DIGITS),
    )
    page = open_page(Comparison(runs))
    training = page.locator("#training")
    assert training.inner_text() == (
        "Training: epochs 6, steps 564, data.train_subset 5,000, data.batch_size 128, "
        "optimizer sgd, optimizer.lr 0.03 | 0.1, scheduler cosine."
    )
    box = training.bounding_box()
    assert box["y"] + box["height"] < page.locator("#plane").bounding_box()["y"] < 900
    assert "optimizer.momentum0.9" in re.sub(r"\s", "", page.locator("#recipe").text_content())
    page.get_by_role("tab", name="digits").click()
    assert training.inner_text() == "Training: epochs 6, steps 564, optimizer.lr 1."


def test_provenance(small_page):
    facts = small_page.inner_text("#environment")
    assert "2.13.0+cpu" in facts
    assert "with uncommitted changes" in facts  # those of seed 3
    commands = small_page.locator("#commands").text_content()
    assert "python train.py compression=snip ratio=0.01 seed=2" in commands


def test_commands_are_in_the_order_of_their_jobs(open_page):
    runs = [one_run(folder=f"multirun/{job}", seed=job) for job in (10, 2, 0, 11, 1)]
    page = open_page(Comparison(tuple(runs)))
    folders = page.locator("#commands tbody td:first-child").all_text_contents()
    assert folders == [f"multirun/{job}" for job in (0, 1, 2, 10, 11)]


def test_hostile_names_are_text(open_page):
    method = f"snip (note={HOSTILE}\u2028)"
    run = one_run(
        method,
        ratio=0.1,
        folder=f"runs/{HOSTILE}",
        command=f"python {HOSTILE}",
        environment={"torch": HOSTILE},
        curves={f"val/{HOSTILE}": Curve((1,), (0.5,))},
        densities={HOSTILE: 0.5},
    )
    # The lone surrogate is a byte of a folder's name that is not UTF-8.
    problems = (Problem(f"runs/\udcff{HOSTILE}", HOSTILE),)
    comparison = Comparison((one_run(), run), problems, (Reference(FASHION, HOSTILE, 0.1, 0.9),))
    page = open_page(comparison, title=HOSTILE)
    page.select_option("#axis", "ratio")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.title() == HOSTILE
    for place in ("h1", "#methods", "#table", "#problem-list", "#environment", "#metric"):
        assert HOSTILE in page.locator(place).text_content()
    # Plotly has tags and templates of its own; a label is broken into lines, no more.
    said = re.sub(r"\s", "", hover(page, method))
    assert re.sub(r"\s", "", f"runs/{HOSTILE}") in said


def test_the_data_stay_in_their_element(tmp_path):
    run = one_run(command=HOSTILE, fit_seconds=float("nan"))
    write_page(Comparison((run,)), tmp_path / "index.html", title=HOSTILE)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    assert json.loads(data)["commands"] == [[run.folder, HOSTILE]]
    assert json.loads(data)["settings"][0]["runs"][0]["x"]["fit_seconds"] is None


def test_a_phone_needs_no_sideways_scrolling_and_no_pointed_fingers(open_page):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = open_page(realistic(all_bits=(32,), seeds=(1,)), **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    plots = page.locator(".plot").evaluate_all("nodes => nodes.map((n) => n.scrollWidth)")
    assert max(plots) <= 390
    targets = page.locator(":is(button, select, summary, .check):visible")
    heights = targets.evaluate_all("nodes => nodes.map((n) => n.getBoundingClientRect().height)")
    assert min(heights) >= 40
    # Folded, the list of methods stays in reach.
    summary = page.locator("#methods-box summary")
    summary.tap()
    page.evaluate("window.scrollTo(0, 2000)")
    assert 0 <= summary.bounding_box()["y"] < 50


def test_a_phone_shows_stored_bytes_beside_the_accuracy(open_page):
    runs = [replace(run, stored_bytes=44_700_000 + run.stored_bytes) for run in SMALL.runs]
    runs[0] = replace(runs[0], method="stable_rps (gradient_scale=projection)")
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = open_page(Comparison(tuple(runs)), **phone)
    cells = page.locator("#table tr > :nth-child(3)")
    assert re.fullmatch(r"4\d,\d{3},\d{3}", cells.all_inner_texts()[1])
    ends = cells.evaluate_all("nodes => nodes.map((n) => n.getBoundingClientRect().right)")
    assert max(ends) <= 390


def test_the_toolbar_covers_no_label(open_page):
    page = open_page(realistic(methods=METHODS[:5], all_bits=(32,), seeds=(1,)))
    inside = """node => {
      const bar = node.querySelector(".modebar").getBoundingClientRect();
      return [...node.querySelectorAll("text")].filter((text) => {
        const box = text.getBoundingClientRect();
        return box.width && box.right > bar.left && box.top < bar.bottom;
      }).map((text) => text.textContent);
    }"""
    plots = page.locator(".plot:has(.modebar)")
    assert plots.count() == 4
    assert [plot.evaluate(inside) for plot in plots.all()] == [[], [], [], []]


def test_no_toolbar_covers_points_on_a_narrow_screen(open_page):
    page = open_page(SMALL, viewport={"width": 390, "height": 844})
    assert page.locator(".modebar-btn").count() == 0
    page.set_viewport_size({"width": 1280, "height": 900})
    expect(page.locator("#plane .modebar-btn")).to_have_count(4)


def test_long_names_break_on_a_phone(open_page):
    setting = Setting("company.data.sets.AVeryLongNameOfData", "company.models.AVeryLongBackbone")
    runs = (
        one_run("company.compression.methods.AVeryLongStrategy", ratio=0.1, setting=setting),
        one_run("mag", ratio=0.1, setting=setting),
    )
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
    page = open_page(Comparison(runs), **phone)
    assert page.evaluate("window.innerWidth") == 390
    cells = page.locator("#table tbody th")
    assert cells.evaluate_all("all => all.every((n) => n.scrollWidth <= n.clientWidth)")


def test_plots_follow_the_width_of_the_window(small_page):
    drawing = small_page.locator("#plane .main-svg").first
    wide = drawing.get_attribute("width")
    assert 900 < float(wide) < 1280
    small_page.set_viewport_size({"width": 700, "height": 900})
    expect(drawing).to_have_attribute("width", "668")  # the window without its margins
    assert small_page.evaluate("document.documentElement.scrollWidth") == 700
    small_page.set_viewport_size({"width": 1280, "height": 900})
    expect(drawing).to_have_attribute("width", wide)


def test_two_hundred_runs_are_small_and_open_soon(browser, tmp_path):
    comparison = realistic(methods=METHODS[:13])
    assert len({(r.method, r.requested_ratio, r.seed) for r in comparison.runs}) == 198
    path = tmp_path / "index.html"
    write_page(comparison, path, title="Comparison")
    assert path.stat().st_size < 8e6
    context = browser.new_context()
    page = context.new_page()
    session = context.new_cdp_session(page)
    # The time that the page computes: waiting for other processes does not count.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    context.close()
    assert 0 < metrics["TaskDuration"] < 5  # about 1.7 s


def test_a_comparison_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run"):
        write_page(Comparison(()), tmp_path / "index.html", title="Empty")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*index\.html"):
        write_page(SMALL, tmp_path / "index.html", title="Comparison")
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
