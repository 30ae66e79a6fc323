"""Ways to make a model small. Every module in this package and below it registers itself."""

from importlib import import_module
from pkgutil import walk_packages

from memfold.strategies.base import (
    Compression,
    Context,
    Strategy,
    compression_of,
    densify,
    strategy_class,
    strategy_names,
)

__all__ = [
    "Compression",
    "Context",
    "Strategy",
    "compression_of",
    "densify",
    "strategy_class",
    "strategy_names",
]

# A strategy is one file: importing it registers it, so that no list needs an edit.
for _module in walk_packages(__path__, prefix=f"{__name__}."):
    import_module(_module.name)
