"""The page in a real browser, headless."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

from memfold.reporting.page import write_page
from reporting.page.comparisons import SMALL, TWO_TASKS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


# Not for the whole session: while it lives, an event loop runs in this thread.
@pytest.fixture(scope="package")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"found none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        # As root, as in many containers, Chromium starts without its sandbox alone.
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page that is open, and all that it complained about and asked for."""

    def __init__(self, browser, folder, comparison, *, title="Comparison", **options):
        self.path = folder / "index.html"
        write_page(comparison, self.path, title=title)
        self.complaints, self.requests = [], []
        self.context = browser.new_context(
            **({"viewport": {"width": 1280, "height": 900}} | options)
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def check(self):
        complaints, self.complaints = self.complaints, []
        assert complaints == []
        asked = {url for url in self.requests if not url.startswith(("data:", "blob:"))}
        assert asked == {self.path.as_uri()}


@pytest.fixture
def open_page(browser, tmp_path):
    """Show a comparison; at the end nothing may have gone wrong or out."""
    visits = []

    def open_page(comparison, **options):
        visits.append(Visit(browser, tmp_path, comparison, **options))
        return visits[-1].page

    yield open_page
    for visit in visits:
        visit.context.close()
        visit.check()


@pytest.fixture(scope="package")
def small_visit(browser, tmp_path_factory):
    visit = Visit(browser, tmp_path_factory.mktemp("small"), SMALL)
    yield visit
    visit.context.close()


@pytest.fixture
def small_page(small_visit):
    """The comparison `SMALL`, opened once for many tests and set to what it opens with."""
    page = small_visit.page
    page.click("#show-all")
    page.select_option("#axis", "stored_bytes")
    page.select_option("#bits", "32")
    page.check("#log")
    page.uncheck("#near")
    page.check("#single")
    yield page
    small_visit.check()


@pytest.fixture(scope="package")
def tasks_visit(browser, tmp_path_factory):
    visit = Visit(browser, tmp_path_factory.mktemp("tasks"), TWO_TASKS)
    yield visit
    visit.context.close()


@pytest.fixture
def tasks_page(tasks_visit):
    """The comparison `TWO_TASKS`, opened once, at its language models."""
    for tab in tasks_visit.page.get_by_role("tab").all()[::-1]:
        tab.click()
    yield tasks_visit.page
    tasks_visit.check()
