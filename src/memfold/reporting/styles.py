"""One colour, dash and marker for each method, the same in every picture.

The marker tells strategies apart where colours do not, the dash their kind: solid for shared
vectors, dash-dotted for masks from before the training, dotted for masks that move, long dashes
for networks that are smaller from the start. Plain dashes are left to published curves and
reference lines.
"""

import colorsys
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from memfold.reporting.records import Comparison

__all__ = ["Style", "comparison_styles", "styles"]


@dataclass(frozen=True)
class Style:
    """How the line of a method looks, for plotly and for matplotlib."""

    colour: str
    """Hexadecimal, at least 3 : 1 against white."""
    dash: str
    """As plotly calls it."""
    linestyle: str | tuple[int, tuple[int, ...]]
    """The same for matplotlib."""
    symbol: str
    """The marker, as plotly calls it."""
    marker: str
    """The same for matplotlib."""


_LINESTYLES: dict[str, str | tuple[int, tuple[int, ...]]] = {
    "solid": "-",
    "dashdot": "-.",
    "dot": ":",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 2, 3)),
}
_DASHES = tuple(_LINESTYLES)
_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "star": "*",
    "pentagon": "p",
    "hexagon": "h",
    "triangle-left": "<",
    "triangle-right": ">",
    "diamond-tall": "d",
    "octagon": "8",
    "hexagon2": "H",
}
_SYMBOLS = tuple(_MARKERS)
# Strategy -> colour, dash, symbol. The shared vectors have colours of Okabe and Ito (2008). The
# others are as far as can be from them and from each other, those with the same dash above all, to
# eyes with and without red, green or blue cones: tests/reporting/test_styles.py says how far.
_KNOWN = {
    "dense": ("#000000", "solid", "star"),
    "stable_rps": ("#0072B2", "solid", "circle"),
    "roast": ("#D55E00", "solid", "square"),
    "hashednet": ("#009E73", "solid", "triangle-up"),
    "rand": ("#95929F", "dashdot", "diamond"),
    "mag": ("#7F3584", "dashdot", "triangle-down"),
    "snip": ("#8C7045", "dashdot", "cross"),
    "grasp": ("#52580D", "dashdot", "x"),
    "synflow": ("#4A0620", "dashdot", "pentagon"),
    "ltr": ("#701D00", "dot", "hexagon"),
    "set": ("#11556D", "dot", "triangle-left"),
    "rigl": ("#9074FC", "dot", "triangle-right"),
    "supermask": ("#3928A1", "longdashdot", "octagon"),
    "small": ("#043E27", "longdash", "diamond-tall"),
    "low_rank": ("#AD4762", "longdash", "hexagon2"),
}


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Choose a style for each method.

    Args:
        methods: A strategy, or one followed by options or its network: `stable_rps
            (gradient_scale=projection)`, `small, cnn`.

    Returns:
        The colour depends on the strategy alone, also for one that is not memfold's. Variants of
        a strategy share it; the further ones, by name, have another dash and marker.
    """
    variants: dict[str, list[str]] = defaultdict(list)
    for method in sorted(set(methods)):
        variants[re.split(r" \(|, ", method)[0]].append(method)
    return {
        method: _style(strategy, number)
        for strategy, names in variants.items()
        for number, method in enumerate(names)
    }


def comparison_styles(comparison: Comparison) -> dict[str, Style]:
    """Return the style of every method and every published curve of a comparison.

    Published curves apart: they do not change how the variants of a strategy look.
    """
    looks = styles(reference.method for reference in comparison.references)
    return looks | styles(run.method for run in comparison.runs)


def _style(strategy: str, variant: int) -> Style:
    colour, dash, symbol = _KNOWN.get(strategy) or _from_name(strategy)
    dash = _DASHES[(_DASHES.index(dash) + variant) % len(_DASHES)]
    symbol = _SYMBOLS[(_SYMBOLS.index(symbol) + 4 * variant) % len(_SYMBOLS)]
    return Style(colour, dash, _LINESTYLES[dash], symbol, _MARKERS[symbol])


def _from_name(strategy: str) -> tuple[str, str, str]:
    """Derive a style that no run of Python and no other method changes."""
    number = zlib.crc32(strategy.encode())
    rgb = colorsys.hls_to_rgb(number % 360 / 360, 0.34, 0.6)
    colour = "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
    return colour, _DASHES[number // 360 % len(_DASHES)], _SYMBOLS[number // 7 % len(_SYMBOLS)]
