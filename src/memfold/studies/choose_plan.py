"""The plan of a comparison: methods, and the setting that each may choose on validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from memfold.file_models import Model, Number, Seed, Seeds, Text, distinct

__all__ = ["Plan", "PlannedRun", "number_text"]

_OF_THE_PLAN = {"ratio", "budget_bytes", "seed", "resume", "hydra.run.dir", "logger.group"}
_DENSE = "compression=dense"
_NO_TEST = "trainer.limit_test_batches=0"

_List = (Field(min_length=1, max_length=1000), AfterValidator(distinct))
_Ratio = Annotated[float, Field(gt=0, le=1)]
_Ratios = Annotated[list[_Ratio], *_List]
_Bytes = Annotated[int, Field(ge=1)]
_Budgets = Annotated[list[_Bytes], *_List]
_Texts = Annotated[list[Text], *_List]


def _check_name(name: str) -> str:
    if not name.replace("_", "").isalnum() or len(name) > 100:
        raise ValueError("must be a name of letters, digits and _")
    return name


_Name = Annotated[str, AfterValidator(_check_name)]


@dataclass(frozen=True)
class PlannedRun:
    """One run of `train.py`."""

    name: str
    """Of its folder."""
    method: str
    budget: float | None
    """A ratio, or bytes, as the plan has it; `None` for the dense model."""
    value: float | None
    """Of the setting that is chosen on validation; `None` where nothing is."""
    overrides: tuple[str, ...]


class Choose(Model):
    """What each method chooses."""

    key: Text
    """Such as `optimizer.lr`."""
    values: Annotated[list[Number], *_List]
    """All that are tried."""
    seed: Seed
    """Of the runs that are only tried on validation."""
    at: Annotated[dict[_Ratio, _Ratios], Field(min_length=1, max_length=1000)] | None = None
    """Ratio where the values are tried -> ratios for which the best of them is used."""
    at_bytes: Annotated[dict[_Bytes, _Budgets], Field(min_length=1, max_length=1000)] | None = None
    """The same of `budget_bytes`, instead."""

    @model_validator(mode="after")
    def _refuse_two_budgets(self) -> Self:
        if (self.at is None) == (self.at_bytes is None):
            raise ValueError("either at (ratios) or at_bytes is needed")
        return self

    @property
    def budgets(self) -> Mapping[float, Sequence[float]]:
        """Where the values are tried -> where the best of them is used."""
        given: dict[Any, Any] = self.at or self.at_bytes or {}
        return given

    @property
    def budget_key(self) -> str:
        """What the budgets are, as `train.py` names it."""
        return "ratio" if self.at is not None else "budget_bytes"


class Plan(Model):
    """Methods, budgets, seeds, and what each method may choose: a YAML file in `comparisons/`."""

    overrides: _Texts
    """Of all runs."""
    methods: Annotated[dict[_Name, _Texts], Field(min_length=1, max_length=1000)]
    """Name -> overrides."""
    seeds: Seeds
    """Of the runs that are compared."""
    choose: Choose | None = None
    ratios: _Ratios | None = None
    """Of all methods but the dense one, where nothing is chosen."""
    bits: Annotated[list[Literal[16, 8, 7, 6, 5, 4, 3]], AfterValidator(distinct)]
    """Per stored value, to which every artifact is packed as well."""

    @model_validator(mode="after")
    def _refuse_what_is_said_twice(self) -> Self:
        """Refuse what would answer one question twice, or another one than the plan asks."""
        fixed = _OF_THE_PLAN | ({"artifact.bits"} if self.bits else set())
        if (self.choose is None) == (self.ratios is None):
            raise ValueError("either choose or ratios is needed")
        if self.choose is not None:
            budgets = [budget for used in self.choose.budgets.values() for budget in used]
            for budget in budgets:
                if budgets.count(budget) > 1:
                    place = "at" if self.choose.at else "at_bytes"
                    raise ValueError(f"choose.{place}: {budget} is there twice")
            if self.choose.key in fixed:
                raise ValueError(f"choose.key cannot be {self.choose.key}")
            fixed |= {self.choose.key}
        given = {"overrides": self.overrides}
        given |= {f"methods.{name}": own for name, own in self.methods.items()}
        for place, texts in given.items():
            for name in (text.lstrip("+~").partition("=")[0] for text in texts):
                if name in fixed:
                    raise ValueError(f"{place}: {name} cannot be set there")
        names: dict[tuple[str, ...], str] = {}
        for name, own in self.methods.items():
            other = names.setdefault(tuple(own), name)
            if other != name:
                raise ValueError(f"methods {other} and {name} are the same")
        return self

    @property
    def groups(self) -> list[tuple[str, float | None]]:
        """The methods, and the budgets at which each chooses; the dense model has none."""
        return [
            (method, place)
            for method, own in self.methods.items()
            for place in ((None,) if _DENSE in own else self._budgets)
        ]

    @property
    def _budgets(self) -> Mapping[float, Sequence[float]]:
        if self.choose is None:
            return {ratio: [ratio] for ratio in self.ratios or ()}
        return self.choose.budgets

    def tried_runs(self, method: str, place: float | None) -> list[PlannedRun]:
        """List the runs among which a method chooses, one for each value, if it does.

        They do not read the test set.
        """
        if self.choose is None:
            return []
        seed = self.choose.seed
        return [self._run(method, place, value, seed, _NO_TEST) for value in self.choose.values]

    def compared_runs(
        self, method: str, place: float | None, value: float | None
    ) -> list[PlannedRun]:
        """List the runs with a chosen value, if any: every budget of `place`, every seed."""
        used: Sequence[float | None] = (None,) if place is None else self._budgets[place]
        return [self._run(method, budget, value, seed) for budget in used for seed in self.seeds]

    def _run(
        self, method: str, budget: float | None, value: float | None, seed: int, *more: str
    ) -> PlannedRun:
        own, names = [], [method]
        if budget is not None:
            key = "ratio" if self.choose is None else self.choose.budget_key
            own.append(f"{key}={number_text(budget)}")
            names.append(number_text(budget))
        if self.choose is not None and value is not None:
            key = self.choose.key
            own.append(f"{key}={number_text(value)}")
            names.append(f"{key.rpartition('.')[2]}{number_text(value)}")
        names.append(f"s{seed}")
        overrides = [*self.overrides, *self.methods[method], *own, f"seed={seed}", *more]
        return PlannedRun("-".join(names), method, budget, value, tuple(overrides))


def number_text(value: float | None) -> str:
    """Write a number in full, so that two values have two names; nothing for `None`."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
