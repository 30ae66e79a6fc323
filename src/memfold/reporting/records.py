"""What a report knows: runs, what was wrong with others, and published curves."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Comparison", "Curve", "Problem", "Reference", "Run", "Setting"]


@dataclass(frozen=True)
class Curve:
    """One metric over the optimizer steps of one run."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, order=True)
class Setting:
    """What runs must share to stand in one picture."""

    data: str
    backbone: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A completed run, with its values stored at one number of bits."""

    folder: str
    """The run folder."""
    setting: Setting
    strategy: str
    """Name of the strategy, such as `stable_rps`."""
    method: str
    """The strategy, followed by those of its options in which compared runs differ: one line."""
    seed: int
    ratio: float
    """Stored learned values over compressible weights, as it came out."""
    requested_ratio: float | None
    """The same as it was asked for; `None` for dense, and where bytes were asked for instead."""
    bits: int
    """Per stored value: 32, 16, 8 or 4."""
    accuracy: float
    """On the test set, of what is stored: with fewer than 32 bits, of the packed artifact."""
    val_accuracy: float | None
    stored_bytes: int
    dense_bytes: int
    """Stored bytes of the uncompressed model."""
    train_state_bytes: int | None
    peak_bytes: int | None
    """Highest memory of training above its start."""
    fit_seconds: float | None
    step_seconds: float | None
    """Median of one optimizer step."""
    epochs: float | None
    steps: int | None = None
    """Optimizer steps, over all rounds."""
    index_bytes: int | None = None
    """Part of the stored bytes."""
    budget_bytes: int | None = None
    """What was asked for instead of a ratio."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The strategy's options, without ratio, bytes, bits and seed; `distill`: its teacher."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """How it was trained, named as on the command line; empty where the result does not say."""
    environment: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """`train/loss`, `val/acc` and the like, thinned out to what a plot can show. Empty for values
    that were packed after training: the run at the bits it was trained for has them."""
    densities: Mapping[str, float] = field(default_factory=dict)
    """Last share of kept weights of each tensor; empty unless the strategy is sparse, and where
    `curves` is."""

    @property
    def is_dense(self) -> bool:
        """Whether nothing was compressed."""
        return self.strategy == "dense"

    @property
    def request(self) -> tuple[str, float]:
        """What was asked for: seeds that share it, and the rest, are averaged."""
        if self.requested_ratio is not None:
            return "ratio", self.requested_ratio
        if self.budget_bytes is not None:
            return "budget_bytes", self.budget_bytes
        return "found", float(f"{self.ratio:.2g}")

    @property
    def stored_ratio(self) -> float:
        """Stored bytes over those of the dense model."""
        return self.stored_bytes / self.dense_bytes


@dataclass(frozen=True)
class Problem:
    """A folder that is not in the picture, or not as a reader would expect, and why."""

    folder: str
    reason: str
    """One line."""


@dataclass(frozen=True)
class Reference:
    """One point of a published curve."""

    setting: Setting
    method: str
    ratio: float
    accuracy: float
    """In [0, 1]."""


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of."""

    runs: tuple[Run, ...]
    problems: tuple[Problem, ...] = ()
    references: tuple[Reference, ...] = ()
