"""What is measured: one model, made small in one way, trained and run under fixed conditions."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memfold.compression import Strategy
from memfold.errors import InputError

__all__ = [
    "CONSTRUCTIONS",
    "DTYPES",
    "OPTIMIZERS",
    "Case",
    "StrategySpec",
    "parse_strategies",
    "with_dense",
]

DTYPES = ("float32", "float64", "bfloat16", "amp_bf16", "amp_fp16")
"""Dtype of the model, or float32 under autocast to that dtype."""
OPTIMIZERS = ("sgd", "adamw")
CONSTRUCTIONS = ("dense", "meta")
"""Where the model is built before it is compressed: as usual, or on the meta device."""


@dataclass(frozen=True)
class StrategySpec:
    """A strategy and its options, without a ratio."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement. Cases that agree in all but the way of compression are one group."""

    model: str
    """Name of a workload."""
    strategy: str = "dense"
    ratio: float | None = None
    """`None` for the dense model, or for the strategy's own default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the strategy, passed through to `memfold.compress`."""
    construction: str = "dense"
    dtype: str = "float32"
    compiled: bool = False
    optimizer: str = "sgd"
    batch_size: int
    device: str = "cpu"
    threads: int
    warmup: int = 3
    """Training steps before the timed ones."""
    steps: int = 10
    """Timed training steps."""
    in_turn: int = 0
    """Further steps, each right after one of the dense model in the same process."""
    seed: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether this is the base of its group's ratios."""
        return self.strategy == "dense"

    @property
    def variant(self) -> str:
        """Name the way of compression, the ratio left out."""
        options = (f"{key}={_text(value)}" for key, value in self.options.items())
        words = [self.strategy, *options]
        return " ".join(words + (["from meta"] if self.construction == "meta" else []))

    @property
    def name(self) -> str:
        """Name the case inside its group."""
        if self.ratio is None:
            return self.variant
        return self.variant.replace(self.strategy, f"{self.strategy} {self.ratio:g}", 1)

    @property
    def group(self) -> str:
        """Name the conditions that this case shares with its dense one."""
        return (
            f"{self.model}, batch {self.batch_size}, {self.optimizer}, {self.dtype}, "
            f"{'compiled' if self.compiled else 'eager'}, {self.device}, {self.threads} threads"
        )

    def dense(self) -> "Case":
        """Return the case that this one is compared with."""
        return replace(
            self, strategy="dense", ratio=None, options={}, construction="dense", in_turn=0
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain values."""
        return asdict(self)


def parse_strategies(text: str) -> list[StrategySpec]:
    """Read a list such as `stable_rps,stable_rps:autograd=classic+sign=weight,low_rank`.

    Options follow a colon and are joined by `+`; values are JSON, or else words.

    Raises:
        InputError: A strategy or an option is unknown, or a value is out of range.
    """
    # A comma or plus sign inside a JSON list or a number separates nothing.
    return [_parse_strategy(part) for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def with_dense(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Sort cases into groups, each led by its dense case; a case given twice is measured once."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        group = groups.setdefault(case.group, [case.dense()])
        if case not in group:
            group.append(case)
    return groups


def _parse_strategy(text: str) -> StrategySpec:
    name, _, rest = text.strip().partition(":")
    options = {}
    for item in re.split(r"\+(?=\w+=)", rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--strategies {text.strip()}: options are written name:key=value")
        if key == "ratio":
            raise InputError(f"--strategies {text.strip()}: ratios are given by --ratios")
        options[key] = _value(value)
    Strategy.from_dict({"name": name, **options})
    return StrategySpec(name, options)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
