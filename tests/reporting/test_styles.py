from memfold.reporting.records import Comparison, Reference
from memfold.reporting.styles import comparison_styles, styles
from memfold.strategies import strategy_names
from reporting.page.comparisons import one_run


def contrast_to_white(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)


def test_every_strategy_has_a_colour_and_a_marker_of_its_own():
    found = styles(strategy_names())
    assert len({style.colour for style in found.values()}) == len(found)
    assert len({style.marker for style in found.values()}) == len(found)
    assert len({style.symbol for style in found.values()}) == len(found)


def test_colours_can_be_seen_on_white():
    names = [*strategy_names(), *(f"own_{number}" for number in range(500))]
    assert min(contrast_to_white(style.colour) for style in styles(names).values()) >= 3


def test_a_style_does_not_depend_on_the_other_methods():
    alone = styles(["rigl"])["rigl"]
    assert styles([*strategy_names(), "my_own", "rigl"])["rigl"] == alone


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
