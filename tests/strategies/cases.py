"""One row per strategy: options under which it fits the small models of these tests."""

from memfold.strategies import strategy_class
from memfold.strategies.sharing.base import SharingStrategy

STRATEGIES = {
    "dense": {},
    "stable_rps": {},
    "roast": {"tile_rows": 2, "tile_columns": 3},
    "hashednet": {},
}

TRAINS_DENSE = ("dense",)
"""Strategies that train as many numbers as the dense model has."""

SHARING = tuple(name for name in STRATEGIES if issubclass(strategy_class(name), SharingStrategy))
