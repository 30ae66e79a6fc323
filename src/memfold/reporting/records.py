"""What a report knows: runs, what was wrong with others, and published curves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from memfold.file_models import Text
from memfold.reporting.metrics import is_share, name_of
from memfold.runs.primary import ACCURACY, Primary, is_near

__all__ = [
    "MAX_STEPS",
    "SMALLEST_RATIO",
    "Comparison",
    "Curve",
    "Network",
    "Problem",
    "Reference",
    "Run",
    "Setting",
    "Share",
    "value_types",
]

SMALLEST_RATIO = 1e-9
"""A logarithmic axis has no place for 0."""
MAX_STEPS = 2**53
"""What a float counts."""
_LARGEST = 2**63 - 1  # what is larger is damaged, and overflows a float at some point

Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST)]
Bytes = Annotated[int, Field(strict=True, ge=1, le=_LARGEST)]
Number = Annotated[float, Field(strict=True, ge=0, le=_LARGEST)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Value = Annotated[float, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
Ratio = Annotated[float, Field(strict=True, ge=SMALLEST_RATIO, le=_LARGEST)]
Step = Annotated[int, Field(strict=True, ge=0, lt=MAX_STEPS)]


@dataclass(frozen=True)
class Curve:
    """One metric over the optimizer steps of one run."""

    steps: tuple[Step, ...]
    values: tuple[Annotated[float, Field(strict=True, allow_inf_nan=False)], ...]

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            ValueError: They differ.
        """
        if len(self.steps) != len(self.values):
            raise ValueError("must have as many steps as values")


@dataclass(frozen=True, order=True)
class Setting:
    """What runs must share to stand in one picture."""

    data: Text
    """Which, as a reader would say it: `digits`, `table flats.csv, price`."""
    backbone: Text
    primary: Primary = ACCURACY
    """The metric by which its runs are judged."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What it is called; an accuracy goes without saying."""
        metric = () if self.primary == ACCURACY else (name_of(self.primary),)
        return self.data, self.backbone, *metric


@dataclass(frozen=True)
class Network:
    """That of a run in a setting of another one."""

    backbone: Text
    """As `backbone=` has it."""
    name: Text
    """The same, with what tells it from the others of the setting."""
    dense_bytes: Bytes
    """Stored bytes of its uncompressed model."""


def value_types(primary: Primary) -> tuple[Any, Any]:
    """Return what test and validation values must be, for `memfold.file_models.check`."""
    kind = cast("Any", Share if is_share(primary) else Value)
    return kind, kind | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A completed run, with its values stored at one number of bits."""

    folder: Text
    """The run folder."""
    setting: Setting
    network: Network | None = None
    """Its own, where backbones are joined and it is not the one that the setting is named after."""
    source: Mapping[str, object] = field(default_factory=dict)
    """Of data that their kind does not name: `data`, the kind, and what tells which they are."""
    strategy: Text
    """Name of the strategy, such as `stable_rps`."""
    method: Text
    """The strategy, followed by those of its options in which compared runs differ, and by its
    network where it has one: one line."""
    seed: Count
    fold: Count | None = None
    """Of a cross-validation: the part of the data that is the test split."""
    ratio: Ratio
    """Stored learned values over compressible weights of its own network, as it came out."""
    requested_ratio: Annotated[Ratio, Field(le=1)] | None = None
    """The same as it was asked for; `None` for dense, and where bytes were asked for instead."""
    bits: Literal[32, 16, 8, 7, 6, 5, 4, 3]
    """Per stored value."""
    test: Value
    """The setting's metric on the test split, of what is stored: with fewer than 32 bits, of the
    packed artifact."""
    val: Value | None = None
    """The same on the validation split."""
    stored_bytes: Bytes
    dense_bytes: Bytes
    """Stored bytes of the uncompressed model of the setting."""
    train_state_bytes: Count | None = None
    peak_bytes: Count | None = None
    """Highest memory of training above its start."""
    fit_seconds: Number | None = None
    step_seconds: Number | None = None
    """Median of one optimizer step."""
    epochs: Number | None = None
    steps: Count | None = None
    """Optimizer steps, over all rounds."""
    rounds: Count | None = None
    """How often it was trained: 1, but for strategies that train in rounds."""
    operations: Count | None = None
    """Multiply-adds of a forward pass, for each token or sample."""
    index_bytes: Count | None = None
    """Part of the stored bytes."""
    budget_bytes: Bytes | None = None
    """What was asked for instead of a ratio."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The strategy's options, without ratio, bytes, bits and seed; `distill`: its teacher;
    `ema`: the decay of its average of weights; `feedback_samples`: how many its artifact was
    rounded with; `init_from`: whose weights it started from."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """How it was trained, named as on the command line; empty where the result does not say."""
    environment: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """`train/loss`, the metric and the like, thinned out to what a plot can show. Empty for values
    that were packed after training: the run at the bits it was trained for has them."""
    densities: Mapping[str, Share] = field(default_factory=dict)
    """Last share of kept weights of each tensor; empty unless the strategy is sparse, and where
    `curves` is."""

    @property
    def is_dense(self) -> bool:
        """Whether nothing was compressed."""
        return self.strategy == "dense"

    @property
    def request(self) -> tuple[str, float]:
        """What was asked for: seeds and folds that share it, and the rest, are averaged.

        Ratios of two networks are no more alike than their weights are many; bytes are. A ratio
        that the strategy did not come near counts as if nobody had asked for it.
        """
        if self.requested_ratio is not None and self.is_near:
            return f"ratio{self._of_network}", self.requested_ratio
        if self.budget_bytes is not None:
            return "budget_bytes", self.budget_bytes
        return f"found{self._of_network}", float(f"{self.ratio:.2g}")

    @property
    def asked(self) -> str:
        """The same in words; a ratio that nobody asked for is marked, as `~0.12`."""
        kind, value = self.request
        if kind == "budget_bytes":
            return f"{value:,.0f} bytes"
        mark = "~" if kind.startswith("found") and not self.is_dense else ""
        return f"{mark}{value:g}{self._of_network}"

    @property
    def is_near(self) -> bool:
        """Whether the ratio is the one that was asked for, to a tenth of it."""
        asked = self.requested_ratio
        return asked is not None and is_near(self.ratio, asked)

    @property
    def _of_network(self) -> str:
        return f" of {self.network.name}" if self.network else ""

    @property
    def stored_ratio(self) -> float:
        """Stored bytes over those of the dense model of the setting."""
        return self.stored_bytes / self.dense_bytes


@dataclass(frozen=True)
class Problem:
    """A folder that is not in the picture, or not as a reader would expect, and why."""

    folder: Text
    reason: Text
    """One line."""


@dataclass(frozen=True)
class Reference:
    """One point of a published curve."""

    setting: Setting
    """One of accuracies: no others are published."""
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
