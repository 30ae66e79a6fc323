"""What a run is called: short enough for a legend, and telling apart what a sweep compares."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from memfold.compression import Strategy
from memfold.memory import Footprint
from memfold.runs.data_names import digest, name_data, source_of

__all__ = ["LONGEST_TAG", "RunLabels", "label_run"]

LONGEST_TAG = 64  # characters that W&B takes
_SHARED_BY_ALL = ("ratio", "budget_bytes", "bits", "seed")


@dataclass(frozen=True)
class RunLabels:
    """The names of one run, for loggers."""

    name: str
    """`resnet20-stable_rps-0.01-s1`."""
    method: str
    """The strategy and its options that are not the default, as in a report:
    `stable_rps (gradient_scale=projection)`."""
    data: str
    """The data set: `digits`; of the user's own data also which they are, with a digest that tells
    two paths of the same last part apart: `table flats.csv, price (0a1b2c3d)`."""
    setting: str
    """The name with the data and without the seed, `digits-resnet20-stable_rps-0.01`: runs of one
    point of a comparison share it."""
    tags: tuple[str, ...]
    """Strategy, backbone and data set."""


def label_run(
    config: Mapping[str, Any],
    choices: Mapping[str, Any],
    strategy: Strategy,
    counts: Footprint,
    said: Mapping[str, object],
) -> RunLabels:
    """Name a run.

    Args:
        config: The resolved configuration.
        choices: Hydra's choice for each group.
        strategy: Of the run.
        counts: Of the compressed network, before training.
        said: What the data say of their source.
    """
    changed = _changed_options(strategy)
    variants = [_short(key, value) for key, value in changed.items()]
    told = ", ".join(f"{key}={_text(value)}" for key, value in changed.items())
    bits = [] if strategy.bits == 32 else [f"{strategy.bits}bit"]
    further = ["distilled"] if config["distill"]["teacher"] else []
    further += ["pretrained"] if config["init_from"] else []
    further += ["ema"] if config["callbacks"].get("ema") else []
    further += ["feedback"] if config["artifact"]["feedback_samples"] else []
    asked = "-".join([strategy.name, *variants, *_budget(strategy, counts), *bits, *further])
    kind, target = str(choices["data"]), config["backbone"].get("target")
    options = {f"data.{key}": value for key, value in config["data"].items()}
    source = source_of({"data_source": said, "recipe": options})
    (name,) = name_data([(kind, source)])
    data = f"{name} ({digest((kind, source))})" if source else name
    backbone = target.rpartition(".")[2] if isinstance(target, str) else str(choices["backbone"])
    return RunLabels(
        name=f"{backbone}-{asked}-s{config['seed']}",
        method=f"{strategy.name} ({told})" if told else strategy.name,
        data=data,
        setting=f"{data}-{backbone}-{asked}",
        tags=(strategy.name, backbone[:LONGEST_TAG], kind[:LONGEST_TAG]),
    )


def _changed_options(strategy: Strategy) -> dict[str, Any]:
    return {
        field.name: getattr(strategy, field.name)
        for field in fields(strategy)
        if field.name not in _SHARED_BY_ALL and getattr(strategy, field.name) != field.default
    }


def _budget(strategy: Strategy, counts: Footprint) -> list[str]:
    if strategy.budget_bytes is not None:
        return [f"{strategy.budget_bytes}B"]
    if strategy.requested_ratio is not None:
        return [f"{strategy.requested_ratio:.3g}"]
    return [f"{counts.ratio:.3g}"] if counts.ratio < 1 else []


def _short(key: str, value: Any) -> str:
    """Return the value alone where it speaks for itself."""
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    return value if isinstance(value, str) else f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
