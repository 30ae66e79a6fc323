"""The file that says what is tuned, by which metric and with which seeds."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.files import read_yaml_text

if TYPE_CHECKING:
    import optuna

__all__ = ["Choice", "Float", "Int", "Pruning", "Setting", "Space", "Value", "read_space"]

Value = bool | int | float | str | None
Setting = dict[str, Value]
"""A value for each parameter of a space."""

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_METRIC = re.compile(r"(packed/)?val/[\w/]+")
_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Float:
    """A number in [low, high], drawn evenly or evenly in its logarithm."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: "optuna.Trial", key: str) -> Value:
        """Let the sampler choose."""
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def examples(self) -> tuple[Value, ...]:
        """Return values that stand for all."""
        return (self.low,)


@dataclass(frozen=True)
class Int:
    """A whole number from low to high."""

    low: int
    high: int
    log: bool = False

    def suggest(self, trial: "optuna.Trial", key: str) -> Value:
        """Let the sampler choose."""
        return trial.suggest_int(key, self.low, self.high, log=self.log)

    def examples(self) -> tuple[Value, ...]:
        """Return values that stand for all."""
        return (self.low,)


@dataclass(frozen=True)
class Choice:
    """One of several values, or of the choices of a configuration group."""

    values: tuple[Value, ...]

    def suggest(self, trial: "optuna.Trial", key: str) -> Value:
        """Let the sampler choose."""
        return trial.suggest_categorical(key, self.values)

    def examples(self) -> tuple[Value, ...]:
        """Return all values: each may be the one that `train.py` does not know."""
        return self.values


Parameter = Float | Int | Choice


@dataclass(frozen=True)
class Pruning:
    """When a trial is stopped that is worse than the median of the earlier ones."""

    startup_trials: int = 5
    """Trials that are completed before the first is stopped."""
    warmup_epochs: int = 1
    """Epochs of each trial before it can be stopped."""


@dataclass(frozen=True)
class Space:
    """What is tuned and how."""

    parameters: Mapping[str, Parameter]
    metric: str
    """A metric of `result.json`, on validation data."""
    maximize: bool
    tuning_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    sampler_seed: int
    startup_trials: int
    """Random trials before the sampler (TPE) uses what it has seen."""
    pruning: Pruning | None

    def suggest(self, trial: "optuna.Trial") -> Setting:
        """Let the study's sampler choose a value for each parameter."""
        return {key: one.suggest(trial, key) for key, one in self.parameters.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, in the order of the file, for JSON."""
        parameters = {
            key: {type(one).__name__.lower(): _plain(asdict(one))}
            for key, one in self.parameters.items()
        }
        return _plain({**vars(self), "pruning": self.pruning and asdict(self.pruning)}) | {
            "parameters": parameters
        }


def read_space(path: Path) -> Space:
    """Read and check a search space.

    Args:
        path: A YAML file; `tuning/sgd.yaml` shows every key.

    Raises:
        InputError: The file cannot be read, or a key or value in it is wrong.
    """
    try:
        loaded = OmegaConf.create(read_yaml_text(path))
        content: Any = OmegaConf.to_container(loaded)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as a search space: {reason}") from error
    reader = _Reader(path)
    top = reader.mapping(
        content, "the file", ("parameters", "objective", "sampler", "pruner"), _SEED_LISTS
    )
    objective = reader.mapping(top.get("objective", {}), "objective", ("metric", "direction"))
    sampler = reader.mapping(top.get("sampler", {}), "sampler", ("seed", "startup_trials"))
    metric = objective.get("metric", "val/acc")
    if not isinstance(metric, str) or not _METRIC.fullmatch(metric):
        reader.refuse(
            f"objective.metric must be a validation metric such as val/acc or val/best_acc, "
            f"got {metric!r}"
        )
    direction = objective.get("direction", "maximize")
    if direction not in ("maximize", "minimize"):
        reader.refuse(f"objective.direction must be maximize or minimize, got {direction!r}")
    tuning_seeds, test_seeds = (reader.seeds(top.get(name), name) for name in _SEED_LISTS)
    both = sorted(set(tuning_seeds) & set(test_seeds))
    if both:
        seeds = ", ".join(map(str, both))
        reader.refuse(
            f"tuning_seeds and test_seeds share {seeds}; they must have no seed in common"
        )
    return Space(
        parameters=reader.parameters(top.get("parameters")),
        metric=metric,
        maximize=direction == "maximize",
        tuning_seeds=tuning_seeds,
        test_seeds=test_seeds,
        sampler_seed=reader.count(sampler.get("seed", 0), "sampler.seed"),
        startup_trials=reader.count(sampler.get("startup_trials", 10), "sampler.startup_trials"),
        pruning=reader.pruning(top.get("pruner", {})),
    )


_SEED_LISTS = ("tuning_seeds", "test_seeds")


class _Reader:
    """Checks of single keys, each with its one-line error."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refuse(self, message: str) -> NoReturn:
        raise InputError(f"{self._path}: {message}")

    def mapping(self, value: Any, name: str, *known: tuple[str, ...]) -> dict[str, Any]:
        names = [key for keys in known for key in keys]
        if not isinstance(value, dict):
            self.refuse(f"{name} must be a mapping with the keys {', '.join(names)}")
        for key in value:
            if key not in names:
                self.refuse(f"{key} is no key of {name}; keys: {', '.join(names)}")
        return value

    def count(self, value: Any, name: str) -> int:
        if not _is_whole(value) or not 0 <= value <= _MAX_SEED:
            self.refuse(f"{name} must be a whole number from 0 to {_MAX_SEED}, got {value!r}")
        return value

    def seeds(self, value: Any, name: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not value:
            self.refuse(f"{name} must be a list of at least one seed, got {value!r}")
        seeds = tuple(self.count(seed, name) for seed in value)
        if len(set(seeds)) < len(seeds):
            self.refuse(f"{name} has a seed twice: {value}")
        return seeds

    def pruning(self, value: Any) -> Pruning | None:
        if value is None:
            return None
        options = self.mapping(value, "pruner", ("startup_trials", "warmup_epochs"))
        return Pruning(**{k: self.count(v, f"pruner.{k}") for k, v in options.items()})

    def parameters(self, value: Any) -> dict[str, Parameter]:
        if not isinstance(value, dict) or not value:
            self.refuse("parameters must name at least one key of train.py, such as optimizer.lr")
        return {key: self.parameter(key, entry) for key, entry in value.items()}

    def parameter(self, key: Any, entry: Any) -> Parameter:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            self.refuse(f"parameters: {key!r} is no key of train.py")
        kinds = ", ".join(_KINDS)
        if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in _KINDS:
            self.refuse(f"parameters: {key} must have one of {kinds}, got {entry!r}")
        ((kind, options),) = entry.items()
        return _KINDS[kind](self, key, options)

    def read_range(self, key: str, kind: str, options: Any) -> dict[str, Any]:
        values = self.mapping(options, f"{key}: {kind}", ("low", "high", "log"))
        for bound in ("low", "high"):
            value = values.get(bound)
            good = _is_whole(value) if kind == "int" else _is_number(value)
            if not good:
                expected = "a whole number" if kind == "int" else "a number"
                self.refuse(f"{key}: {bound} must be {expected}, got {value!r}")
        log = values.get("log", False)
        if not isinstance(log, bool):
            self.refuse(f"{key}: log must be true or false, got {log!r}")
        low, high = values["low"], values["high"]
        if low >= high:
            self.refuse(f"{key}: low must be smaller than high, got {low} and {high}")
        if log and low <= 0:
            self.refuse(f"{key}: low must be above 0 with log: true, got {low}")
        return {"low": low, "high": high, "log": log}

    def read_float(self, key: str, options: Any) -> Parameter:
        values = self.read_range(key, "float", options)
        return Float(float(values["low"]), float(values["high"]), values["log"])

    def read_int(self, key: str, options: Any) -> Parameter:
        return Int(**self.read_range(key, "int", options))

    def read_choice(self, key: str, options: Any) -> Parameter:
        if not isinstance(options, list) or not options:
            self.refuse(f"{key}: choice must be a list of at least one value, got {options!r}")
        for value in options:
            if not isinstance(value, Value) or (isinstance(value, float) and not _is_number(value)):
                self.refuse(
                    f"{key}: a choice is a number, a text, true, false or null, got {value!r}"
                )
        if any(a == b for i, a in enumerate(options) for b in options[:i]):
            self.refuse(f"{key}: a choice stands twice in {options}")
        return Choice(tuple(options))


_KINDS: dict[str, Callable[[_Reader, str, Any], Parameter]] = {
    "float": _Reader.read_float,
    "int": _Reader.read_int,
    "choice": _Reader.read_choice,
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
