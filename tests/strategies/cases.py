"""One row per strategy: options under which it fits the small models of these tests."""

from memfold.strategies import strategy_class
from memfold.strategies.sharing.base import SharingStrategy

STRATEGIES = {
    "dense": {},
    "stable_rps": {},
    "roast": {"tile_rows": 2, "tile_columns": 3},
    "hashednet": {},
    "small": {},
    "rand": {},
    "mag": {},
    "snip": {},
    "grasp": {},
    "synflow": {"rounds": 10},
    "set": {"update_every": 5},
    "rigl": {"update_every": 5},
    "supermask": {},
    "low_rank": {},
}

TRAINS_DENSE = ("dense", "supermask")
"""Strategies that train as many numbers as the dense model has."""

NEEDS_WIDTHS = ("small",)
"""Strategies for backbones that can be built narrower; any other is refused (`test_small.py`)."""

NEEDS_DATA = ("snip", "grasp", "synflow")
"""Strategies that look at data; the models get them in `pruning/test_at_init.py`."""

RATIO_OF_SMALL_MODELS = {"dense": None, "low_rank": 0.6, "supermask": 0.6}
"""Where it is not the usual 0.4: rank one takes more of a tiny matrix, and with 0.4 a row of the
weight-normed layer keeps nothing, which weight norm divides by zero."""

ANY_MODULE = tuple(sorted(STRATEGIES.keys() - {*NEEDS_WIDTHS, *NEEDS_DATA}))
"""Strategies for any module, without data."""

SHARING = tuple(name for name in STRATEGIES if issubclass(strategy_class(name), SharingStrategy))


def ratio_of(name: str) -> dict[str, float]:
    """Return the ratio, as an option, under which a strategy fits the small models."""
    ratio = RATIO_OF_SMALL_MODELS.get(name, 0.4)
    return {} if ratio is None else {"ratio": ratio}
