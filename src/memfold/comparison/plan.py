"""The plan of a comparison, read from a YAML file and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfold.comparison.plan_file import read_mapping
from memfold.errors import InputError
from memfold.overrides import quote_value

__all__ = ["Plan", "PlannedRun", "number_text", "read_plan"]

_KEYS = {"overrides", "methods", "seeds", "choose", "bits"}
_CHOOSE_KEYS = {"key", "values", "seed", "at"}
_BITS = (16, 8, 4)
_OF_THE_PLAN = {"ratio", "budget_bytes", "seed", "resume", "hydra.run.dir", "logger.group"}
_DENSE = "compression=dense"
_NO_TEST = "trainer.limit_test_batches=0"
_TRIED = "logger.job_type=tune"  # where W&B leaves it out of the comparison


@dataclass(frozen=True)
class PlannedRun:
    """One run of `train.py`."""

    name: str
    """Of its folder."""
    method: str
    ratio: float | None
    """`None` for the dense model."""
    value: float
    """Of the setting that is chosen on validation."""
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Methods, ratios and seeds, and the setting that each method may choose on validation."""

    overrides: tuple[str, ...]
    """Of all runs."""
    methods: Mapping[str, tuple[str, ...]]
    """Name -> overrides."""
    seeds: tuple[int, ...]
    """Of the runs that are compared."""
    key: str
    """What each method chooses, such as `optimizer.lr`."""
    values: tuple[float, ...]
    """All that are tried."""
    choice_seed: int
    """Of the runs that are only tried on validation."""
    at: Mapping[float, tuple[float, ...]]
    """Ratio where the values are tried -> ratios for which the best of them is used."""
    bits: tuple[int, ...]
    """Per stored value, to which every artifact is packed as well."""

    def is_dense(self, method: str) -> bool:
        """Tell whether a method has no ratio."""
        return _DENSE in self.methods[method]

    def places(self, method: str) -> tuple[float | None, ...]:
        """Return the ratios at which a method tries the values."""
        return (None,) if self.is_dense(method) else tuple(self.at)

    def tried_runs(self, method: str, place: float | None) -> list[PlannedRun]:
        """List the runs among which a method chooses, one for each value.

        They do not read the test set.
        """
        more = (_NO_TEST, _TRIED) if self._is_in_wandb(method) else (_NO_TEST,)
        return [self._run(method, place, value, self.choice_seed, *more) for value in self.values]

    def compared_runs(self, method: str, place: float | None, value: float) -> list[PlannedRun]:
        """List the runs with a chosen value: every ratio of `place`, every seed."""
        ratios = (None,) if place is None else self.at[place]
        return [self._run(method, ratio, value, seed) for ratio in ratios for seed in self.seeds]

    def _run(
        self, method: str, ratio: float | None, value: float, seed: int, *more: str
    ) -> PlannedRun:
        own = [f"{self.key}={number_text(value)}", f"seed={seed}", *more]
        names = [method, f"{self.key.rpartition('.')[2]}{number_text(value)}", f"s{seed}"]
        if ratio is not None:
            own.insert(0, f"ratio={number_text(ratio)}")
            names.insert(1, number_text(ratio))
        group = [f"logger.group={quote_value(method)}"] if self._is_in_wandb(method) else []
        overrides = [*self.overrides, *self.methods[method], *own, *group]
        return PlannedRun("-".join(names), method, ratio, value, tuple(overrides))

    def _is_in_wandb(self, method: str) -> bool:
        given = [*self.overrides, *self.methods[method]]
        chosen = [text for text in given if text.startswith("logger=")][-1:]
        return chosen in ([], ["logger=wandb"])  # train.py has it without being told


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Args:
        path: A YAML file, such as `comparisons/fashion_mnist.yaml`.

    Raises:
        InputError: It cannot be read, or an entry is missing, unknown or out of range.
    """
    content = read_mapping(path)
    try:
        _check_keys("", content, _KEYS)
        choose = content["choose"]
        _check_keys("choose.", choose, _CHOOSE_KEYS)
        methods = _mapping("methods", content["methods"])
        at = _mapping("choose.at", choose["at"])
        plan = Plan(
            overrides=_texts("overrides", content["overrides"]),
            methods={_name(name): _texts(f"methods.{name}", own) for name, own in methods.items()},
            seeds=tuple(_integers("seeds", content["seeds"])),
            key=str(choose["key"]),
            values=_numbers("choose.values", choose["values"]),
            choice_seed=_integers("choose.seed", [choose["seed"]])[0],
            at={
                _ratios("choose.at", [place])[0]: _ratios(f"choose.at.{place}", ratios)
                for place, ratios in at.items()
            },
            bits=tuple(_bits(content["bits"])),
        )
        _check_runs(plan, num_places=len(at))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return plan


def number_text(value: float) -> str:
    """Write a number in full, so that two values have two names."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _check_runs(plan: Plan, num_places: int) -> None:
    """Refuse what would answer one question twice, or another one than the plan asks."""
    if len(plan.at) < num_places:
        raise InputError("choose.at names a ratio twice")
    _refuse_repeated("choose.at", [ratio for ratios in plan.at.values() for ratio in ratios])
    fixed = _OF_THE_PLAN | ({"artifact.bits"} if plan.bits else set())
    if plan.key in fixed:
        raise InputError(f"choose.key cannot be {plan.key}")
    given = {"overrides": plan.overrides}
    given |= {f"methods.{name}": own for name, own in plan.methods.items()}
    for place, texts in given.items():
        for key in (text.lstrip("+~").partition("=")[0] for text in texts):
            if key in fixed | {plan.key}:
                raise InputError(f"{place}: {key} cannot be set there")
    names: dict[tuple[str, ...], str] = {}
    for name, own in plan.methods.items():
        if own in names:
            raise InputError(f"methods {names[own]} and {name} are the same")
        names[own] = name


def _check_keys(place: str, content: object, keys: set[str]) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{place or 'the plan '}must be a mapping of {', '.join(sorted(keys))}")
    unknown, missing = sorted(map(str, content.keys() - keys)), sorted(keys - content.keys())
    if unknown:
        allowed = ", ".join(sorted(keys))
        raise InputError(f"{place}{unknown[0]} is unknown; there are {allowed}")
    if missing:
        raise InputError(f"{place}{missing[0]} is missing")


def _mapping(key: str, value: object) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{key} must be a mapping with at least one entry")
    return value


def _name(name: object) -> str:
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise InputError(f"methods: {name!r} must be a name of letters, digits and _")
    return name


def _entries(key: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{key} must be a list with at least one entry, got {value!r}")
    _refuse_repeated(key, [str(entry) for entry in value])
    return value


def _refuse_repeated(key: str, values: list[Any]) -> None:
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise InputError(f"{key} names something twice: {repeated[0]}")


def _texts(key: str, value: object) -> tuple[str, ...]:
    return tuple(str(entry) for entry in _entries(key, value))


def _integers(key: str, value: object) -> list[int]:
    entries = _entries(key, value)
    for entry in entries:
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < 0:
            raise InputError(f"{key} must be integers of at least 0, got {entry!r}")
    return entries


def _numbers(key: str, value: object) -> tuple[float, ...]:
    numbers = [_number(key, entry) for entry in _entries(key, value)]
    _refuse_repeated(key, numbers)
    return tuple(numbers)


def _number(key: str, entry: object) -> float:
    """Take `1e-5`, too, which is a text in YAML."""
    if isinstance(entry, int | float | str) and not isinstance(entry, bool):
        try:
            number = float(entry)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise InputError(f"{key} must be numbers, got {entry!r}")


def _ratios(key: str, value: object) -> tuple[float, ...]:
    ratios = _numbers(key, value)
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise InputError(f"{key}: a ratio must be in (0, 1], got {ratio:g}")
    return ratios


def _bits(value: object) -> list[int]:
    if value == []:
        return []
    entries = _integers("bits", value)
    for bits in entries:
        if bits not in _BITS:
            raise InputError(f"bits must be of {', '.join(map(str, _BITS))}, got {bits}")
    return entries
