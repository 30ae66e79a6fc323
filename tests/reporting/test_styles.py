from itertools import combinations

import numpy as np
import pytest

from memfold.reporting.records import Comparison, Reference
from memfold.reporting.styles import _KNOWN, comparison_styles, styles
from reporting.page.comparisons import one_run


def contrast_to_white(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)


def test_every_chosen_style_has_a_colour_and_a_marker_of_its_own():
    found = styles(_KNOWN)
    assert len({style.colour for style in found.values()}) == len(found)
    assert len({style.marker for style in found.values()}) == len(found)
    assert len({style.symbol for style in found.values()}) == len(found)


# Linear RGB as seen with no red, green or blue cones: Machado, Oliveira and Fernandes (2009).
VISIONS = {
    "all cones": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def perceived(colour, vision):
    """The colour in Oklab (Ottosson 2020), where equal distances look equally different."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    seen = np.clip(np.asarray(VISIONS[vision]) @ linear, 0, 1)
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    opponents = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(opponents) @ np.cbrt(np.array(cones) @ seen)


def difference(one, other, vision):
    return np.linalg.norm(perceived(one.colour, vision) - perceived(other.colour, vision))


@pytest.mark.parametrize("vision", VISIONS)
def test_strategies_are_told_apart_with_any_cones(vision):
    for one, other in combinations(styles(_KNOWN).values(), 2):
        least = 0.03 if one.dash != other.dash else 0.08
        assert difference(one, other, vision) > (0.11 if vision == "all cones" else least)


@pytest.mark.parametrize("vision", VISIONS)
def test_what_shares_dash_and_marker_has_another_colour(vision):
    names = [f"{name} ({option})" for name in _KNOWN for option in ("a=1", "a=2", "a=3")]
    for one, other in combinations(styles(names).values(), 2):
        is_alike = (one.dash, one.marker) == (other.dash, other.marker)
        assert not is_alike or difference(one, other, vision) > 0.03


def test_colours_can_be_seen_on_white():
    names = [*_KNOWN, *(f"own_{number}" for number in range(500))]
    assert min(contrast_to_white(style.colour) for style in styles(names).values()) >= 3


def test_a_style_does_not_depend_on_the_other_methods():
    alone = styles(["rigl"])["rigl"]
    assert styles([*_KNOWN, "my_own", "rigl"])["rigl"] == alone


def test_variants_share_the_colour_and_differ_in_dash_and_marker():
    names = ["stable_rps (gradient_scale=length)", "stable_rps (gradient_scale=projection)"]
    one, other = styles(names).values()
    assert one.colour == other.colour == styles(["stable_rps"])["stable_rps"].colour
    assert one.dash != other.dash
    assert one.linestyle != other.linestyle
    assert one.marker != other.marker


def test_published_curves_do_not_change_how_variants_look():
    runs = tuple(one_run(f"mag (scope={scope})", ratio=0.1) for scope in ("global", "layer"))
    published = (Reference(runs[0].setting, "mag", 0.1, 0.7),)
    alone = comparison_styles(Comparison(runs))
    assert comparison_styles(Comparison(runs, (), published)) == alone | styles(["mag"])


def test_a_strategy_of_a_user_looks_the_same_in_every_process():
    assert styles(["my_own"])["my_own"].colour == "#2D238B"
