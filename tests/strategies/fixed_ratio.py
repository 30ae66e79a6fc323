"""A strategy that cannot be asked for a ratio, for tests alone: nothing else lists it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from memfold.compression import strategy
from memfold.compression.strategy import Ratios
from memfold.strategies.pruning.rand import Rand


@dataclass(frozen=True, kw_only=True)
class Quarter(Rand, name="quarter"):
    """Keep a random quarter of the weights."""

    ratios: ClassVar[Ratios] = "one"

    @property
    def asked_ratio(self) -> float:
        return 0.25


del strategy._REGISTRY[Quarter.name]
OVERRIDES = ("compression=rand", f"compression._target_={__name__}.{Quarter.__qualname__}")


@contextmanager
def registered() -> Iterator[None]:
    """Let `quarter` be found by its name."""
    strategy._REGISTRY[Quarter.name] = Quarter
    try:
        yield
    finally:
        del strategy._REGISTRY[Quarter.name]
