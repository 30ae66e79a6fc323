"""What a reader finds on the page."""

import pytest

from memfold.reporting.statistics import AXES, points


def traces(page, plot, role):
    return page.evaluate(
        """([plot, role]) => (document.getElementById(plot).data ?? [])
        .filter((trace) => trace.meta.role === role)
        .map(({x, y, line, meta}) => ({x: [...x], y: [...y], dash: line?.dash, ...meta}))""",
        [plot, role],
    )


def drawn(page):
    """The points of each method's line in the plane."""
    found = traces(page, "plane", "method")
    return {trace["method"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in found}


def expected(comparison, axis, bits=32):
    return by_method(points([r for r in comparison.runs if r.bits == bits], AXES[axis]))


def by_method(chosen):
    found = {}
    for point in chosen:
        found.setdefault(point.method, []).append((point.x, pytest.approx(100 * point.y)))
    return found


def front(page):
    (trace,) = traces(page, "plane", "front")
    return list(zip(trace["x"], trace["y"], strict=True))


def scale(page):
    return page.evaluate("document.getElementById('plane').layout.xaxis.type")


def toggle(page, name):
    page.locator("#methods button").get_by_text(name, exact=True).click()


def column(page, key):
    """The cells of the table under one header."""
    heads = page.locator("#table thead th").evaluate_all("all => all.map((n) => n.dataset.key)")
    return page.locator(f"#table tbody tr > :nth-child({heads.index(key) + 1})").all_inner_texts()


def rows(page, table):
    found = page.locator(f"{table} tbody tr")
    return [row.split("\t") for row in found.all_inner_texts()]


def hover(page, method):
    """Move the mouse to the leftmost point of a method's line; return what is said there."""
    page.locator("#plane").scroll_into_view_if_needed()
    page.mouse.move(0, 0)
    label = page.locator("#plane .hoverlayer .hovertext")
    label.wait_for(state="detached")
    page.mouse.move(*place(page, method))
    label.wait_for()
    return label.text_content()


def place(page, method, role="method"):
    """Where in the window the leftmost point of a method's line is."""
    return page.evaluate(
        """([method, role]) => {
          const plot = document.getElementById("plane");
          const isIt = ({meta}) => meta.role === role && meta.method === method;
          const {x, y} = plot.data.find(isIt);
          const {xaxis, yaxis} = plot._fullLayout;
          const {left, top} = plot.getBoundingClientRect();
          return [left + xaxis._offset + xaxis.d2p(x[0]), top + yaxis._offset + yaxis.d2p(y[0])];
        }""",
        [method, role],
    )
