"""Named lists of cases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfold.benchmarking.cases import Case
from memfold.benchmarking.workloads import workload

__all__ = ["PRESETS", "Preset"]

_CLASSIC = {"autograd": "classic"}
_ALIGNED = {"align_rows": True}


@dataclass(frozen=True)
class Preset:
    """What is measured, and how often."""

    summary: str
    cases: Callable[[str, int], list[Case]]
    """(device, threads) -> cases; the dense ones need not be listed."""
    rounds: int


def _quick(device: str, threads: int) -> list[Case]:
    return [
        _case(model, device, threads, strategy="stable_rps", ratio=ratio, batch_size=32, steps=5)
        for model in ("mlp_tiny", "resnet20")
        for ratio in (0.1, 0.01)
    ]


def _figures(device: str, threads: int) -> list[Case]:
    cases: list[Case] = []

    def add(model: str, ratios: Sequence[float], *variants: Mapping[str, Any], **fields: Any):
        for ratio in ratios:
            for options in variants or ({},):
                shared = {"strategy": "stable_rps", "ratio": ratio, "options": dict(options)}
                cases.append(_case(model, device, threads, **shared, **fields))

    for model in ("resnet20", "vgg11"):
        add(model, (0.1, 0.01))
        add(model, (0.01,), _CLASSIC)
    for model in ("vit", "gpt"):  # seconds a step
        add(model, (1, 0.1, 0.01), warmup=1, steps=3)
        add(model, (0.01,), _CLASSIC, warmup=1, steps=3)
    add("mlp50m", (0.01,), in_turn=15)
    add("mlp50m", (0.01,), _CLASSIC)
    add("mlp50m", (0.01,), construction="meta")
    add("mlp50m", (0.01,), optimizer="adamw")
    add("mlp50m", (0.01,), optimizer="adamw", construction="meta")
    add("mlp38m", (0.0003, 0.001, 0.003, 0.01), in_turn=15)
    add("linear4096", (0.001,), in_turn=15)
    add("linear8192", (0.001, 0.01), in_turn=15)
    return cases


def _paths(device: str, threads: int) -> list[Case]:
    mild, strong = (1, 0.3, 0.1, 0.03), (0.01, 0.003, 0.001, 0.0003)
    variants = (
        (_CLASSIC, mild + strong),
        ({"linear": "weight"}, mild + strong),
        ({"linear": "windows"} | _ALIGNED, mild[1:] + strong),
        ({"linear": "correlation"} | _ALIGNED, strong),
        ({}, mild + strong),
    )
    return [
        _case("mlp38m", device, threads, strategy="stable_rps", ratio=ratio, options=dict(options))
        for options, ratios in variants
        for ratio in ratios
    ]


def _small(device: str, threads: int) -> list[Case]:
    many: dict[str, Any] = {"warmup": 10, "steps": 50, "in_turn": 300}
    few: dict[str, Any] = {"warmup": 3, "steps": 10, "in_turn": 40}
    chosen = [
        ("lenet300", "stable_rps", (1, 0.3, 0.1, 0.03, 0.01, 0.003), many),
        ("lenet300", "roast", (0.1, 0.01), many),
        ("lenet300", "hashednet", (0.1, 0.01), many),
        ("resnet20_8", "stable_rps", (1, 0.1, 0.01), few),
        ("resnet20", "stable_rps", (1, 0.1, 0.01), few),
        ("gpt_small", "stable_rps", (1, 0.1, 0.01), few),
    ]
    return [
        _case(model, device, threads, strategy=strategy, ratio=ratio, **fields)
        for model, strategy, ratios, fields in chosen
        for ratio in ratios
    ]


def _case(model: str, device: str, threads: int, **fields: Any) -> Case:
    fields.setdefault("batch_size", workload(model).batch_size)
    return Case(model=model, device=device, threads=threads, **fields)


PRESETS: dict[str, Preset] = {
    "quick": Preset("a first look, a minute or so on idle cores", _quick, rounds=1),
    "small": Preset("small models, step by step beside the dense one", _small, rounds=1),
    "paths": Preset("each way to compute, over the ratio, on one perceptron", _paths, rounds=2),
    "figures": Preset("the figures of the documentation, about 40 minutes", _figures, 3),
}
"""By name."""
