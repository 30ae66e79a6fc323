"""Ways to make a model small. Every module in this package and below it registers itself."""

import sys
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

from memfold.strategies.base import Context, Strategy, strategy_class, strategy_names
from memfold.strategies.clipping import clip_grad_norm_
from memfold.strategies.compression import (
    Compression,
    before_step,
    compression_of,
    densify,
    release,
)

__all__ = [
    "Compression",
    "Context",
    "Strategy",
    "before_step",
    "clip_grad_norm_",
    "compression_of",
    "densify",
    "release",
    "strategy_class",
    "strategy_names",
]

# A strategy is one file: importing it registers it, so that no list needs an edit.
for _module in walk_packages(__path__, prefix=f"{__name__}."):
    import_module(_module.name)


class _Strategies(ModuleType):
    """`memfold.strategies` is this package, and `memfold.strategies()` lists the names.

    A function of that name in `memfold` would hide the package from attribute look-ups such as
    Hydra's `_target_`.
    """

    def __call__(self) -> tuple[str, ...]:
        """Return the names of all strategies."""
        return strategy_names()


sys.modules[__name__].__class__ = _Strategies
