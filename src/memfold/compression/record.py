"""What an artifact says about its tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memfold.file_format import VERSION

if TYPE_CHECKING:
    from memfold.compression.strategy import Strategy

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """What an artifact says about its tensors."""

    strategy: "Strategy"
    num_values: int
    weights: dict[str, list[int]]
    """Name -> shape of each compressed weight."""
    values: dict[str, list[int]]
    """Name -> shape of each tensor of learned values that stands for them."""
    indices: frozenset[str]
    """Names of the other tensors that do."""
    reshaped: dict[str, list[int]]
    """Name -> shape in the backbone of each untouched tensor that is stored with another."""
    ties: dict[str, str] | None
    """In the backbone: see `accounting.ties_of`; `None` where the file does not say."""
    merged: int | None = None
    """Norms that are stored without statistics; `None` where none are, or an older file does not
    say."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the same in whatever order the mappings were made."""
        return {
            "version": VERSION,
            "strategy": self.strategy.stored.to_dict(),
            "num_values": self.num_values,
            "weights": list(self.weights.items()),
            "values": list(self.values.items()),
            "indices": sorted(self.indices),
            "reshaped": dict(sorted(self.reshaped.items())),
            "ties": None if self.ties is None else dict(sorted(self.ties.items())),
            **({} if self.merged is None else {"merged": self.merged}),
        }
