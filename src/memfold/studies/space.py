"""The file that says what is tuned, by which metric and with which seeds."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from memfold.file_models import Model, Number, Seed, Seeds, distinct
from memfold.runs.primary import ACCURACY, Primary

if TYPE_CHECKING:
    import optuna

__all__ = ["Parameter", "Pruning", "Setting", "Space", "Value"]

Value = bool | int | float | str | None
Setting = dict[str, Value]
"""A value for each parameter of a space."""

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_METRIC = re.compile(r"(packed/)?val/[\w/]+")
_Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Float(Model):
    """A number in [low, high], drawn evenly or evenly in its logarithm."""

    low: Number
    high: Number
    log: bool = False

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be smaller than high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 with log: true, got {self.low}")
        return self


class Int(Float):
    """A whole number from low to high."""

    low: _Whole
    high: _Whole


def _check_values(values: list[Any]) -> list[Any]:
    for value in values:
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if not (isinstance(value, Value) and is_finite):
            raise ValueError(f"a choice is a number, text, true, false or null, got {value!r:.60}")
    return distinct(values)


class Parameter(Model):
    """What a key of `train.py` may be: one of the three."""

    float_: Float | None = Field(None, alias="float")
    int_: Int | None = Field(None, alias="int")
    choice: (
        Annotated[list[Any], Field(min_length=1, max_length=1000), AfterValidator(_check_values)]
        | None
    ) = None
    """One of several values, or of the choices of a configuration group."""

    @model_validator(mode="after")
    def _refuse_several(self) -> Self:
        if sum(one is not None for one in (self.float_, self.int_, self.choice)) != 1:
            raise ValueError("must have one of float, int, choice")
        return self

    @property
    def bounds(self) -> Float | None:
        """Between what a number lies; `None`: it is a choice."""
        return self.float_ or self.int_

    def suggest(self, trial: "optuna.Trial", key: str) -> None:
        """Let the sampler choose, unless it has."""
        if self.choice is not None:
            trial.suggest_categorical(key, self.choice)
        elif self.int_ is not None:
            trial.suggest_int(key, **self.int_.model_dump())
        elif self.float_ is not None:
            trial.suggest_float(key, **self.float_.model_dump())

    def examples(self) -> list[Value]:
        """Return values that stand for all: each choice may be one that `train.py` knows not."""
        return list(self.choice or ()) if self.bounds is None else [self.bounds.low]

    def allows(self, value: Any) -> bool:
        """Tell whether the sampler could have chosen a value."""
        if self.bounds is None:
            return any(value == one and type(value) is type(one) for one in self.choice or ())
        low, high = self.bounds.low, self.bounds.high
        return type(value) is type(low) and low <= value <= high

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        if self.bounds is None:
            return {"choice": {"values": self.choice}}
        return {"int" if self.float_ is None else "float": self.bounds.model_dump()}


class Objective(Model):
    """What is best."""

    metric: str = "val/acc"
    """A metric of `result.json`, on validation data."""
    direction: Literal["maximize", "minimize"] | None = None
    """Which way is better; of an accuracy it need not be said."""

    @model_validator(mode="after")
    def _refuse_test_data(self) -> Self:
        if not _METRIC.fullmatch(self.metric):
            raise ValueError(
                f"metric must be a validation metric such as val/acc or val/best_bpb, "
                f"got {self.metric[:100]!r}"
            )
        if self.direction is None and self.judged.name != ACCURACY.name:
            raise ValueError(f"direction of {self.metric} must be 'maximize' or 'minimize'")
        return self

    @property
    def judged(self) -> Primary:
        """What the metric measures, as it is logged after every epoch and for the test data."""
        short = self.metric.rpartition("/")[2].removeprefix("best_")
        unit = ACCURACY.unit if short == ACCURACY.short else short
        return Primary(f"val/{short}", "min" if self.direction == "minimize" else "max", unit)


class Sampler(Model):
    """TPE."""

    seed: Seed = 0
    startup_trials: Seed = 10
    """Random trials before the sampler uses what it has seen."""


class Pruning(Model):
    """When a trial is stopped that is worse than the median of the earlier ones."""

    startup_trials: Seed = 5
    """Trials that are completed before the first is stopped."""
    warmup_epochs: Seed = 1
    """Epochs of each trial before it can be stopped."""


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key) or len(key) > 200:
        raise ValueError("is no key of train.py")
    return key


class Space(Model):
    """What is tuned and how: a YAML file, of which `tuning/sgd.yaml` shows every key."""

    parameters: Annotated[
        dict[Annotated[str, AfterValidator(_check_key)], Parameter],
        Field(min_length=1, max_length=1000),
    ]
    """Keys of `train.py`, such as `optimizer.lr`."""
    objective: Objective = Objective()
    sampler: Sampler = Sampler()
    pruner: Pruning | None = Pruning()
    tuning_seeds: Seeds
    """Of every trial."""
    test_seeds: Seeds
    """Of the best setting, once, at the end."""

    @model_validator(mode="after")
    def _refuse_common_seeds(self) -> Self:
        both = sorted(set(self.tuning_seeds) & set(self.test_seeds))
        if both:
            seeds = ", ".join(map(str, both[:10]))
            raise ValueError(
                f"tuning_seeds and test_seeds share {seeds}; they must have no seed in common"
            )
        return self

    def allows(self, setting: Setting) -> bool:
        """Tell whether a setting, or a part of one, is of this space."""
        return all(
            key in self.parameters and self.parameters[key].allows(value)
            for key, value in setting.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, in the order of the file, for JSON."""
        return {
            "parameters": {key: one.to_dict() for key, one in self.parameters.items()},
            "metric": self.objective.metric,
            "maximize": self.objective.judged.mode == "max",
            "tuning_seeds": self.tuning_seeds,
            "test_seeds": self.test_seeds,
            "sampler_seed": self.sampler.seed,
            "startup_trials": self.sampler.startup_trials,
            "pruning": self.pruner and self.pruner.model_dump(),
        }
