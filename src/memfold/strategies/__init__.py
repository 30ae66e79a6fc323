"""Ways to make a model small. Every module in this package and below it registers itself."""

import sys
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

from memfold.compression.strategy import strategy_class, strategy_names

__all__ = ["strategy_class", "strategy_names"]

# A strategy is one file: importing it registers it, so that no list needs an edit.
for _module in walk_packages(__path__, prefix=f"{__name__}."):
    if not _module.name.endswith("_kernels"):  # those need Triton, which is not everywhere
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
