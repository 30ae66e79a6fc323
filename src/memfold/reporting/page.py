"""One interactive page that opens from disk, without a network and without other files."""

import html
import json
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from memfold.errors import InputError
from memfold.files import write_text_atomically
from memfold.reporting.page_data import page_data
from memfold.reporting.records import Comparison

__all__ = ["write_page"]

_STATIC = Path(__file__).with_name("static")
_SCRIPTS = ("elements.js", "plane.js", "one_ratio.js", "tables.js", "page.js")
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(comparison: Comparison, path: Path, *, title: str) -> None:
    """Write the page: plots with switches, tables, problems, and where it all comes from.

    Names, reasons and commands are the runs' own and may hold anything: they reach the page as data
    and are shown as text.

    Args:
        comparison: The runs to show.
        path: An HTML file, replaced atomically.
        title: Heading of the page.

    Raises:
        InputError: There is no run, or the file cannot be written.
    """
    if not comparison.runs:
        raise InputError("there is no run to show; a page needs one completed run or more")
    # ASCII: a name that is not UTF-8 (a lone surrogate here) is then no error.
    data = json.dumps(page_data(comparison), separators=(",", ":"), allow_nan=False)
    text = Template(_read("page.html")).substitute(
        title=html.escape(title),
        styles=_read("page.css"),
        data=data.translate(_IN_SCRIPT),
        plotly=get_plotlyjs(),
        scripts="".join(_read(name) for name in _SCRIPTS),
    )
    write_text_atomically(path, text.encode("utf-8", "xmlcharrefreplace").decode("utf-8"))


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")
