"""One row per strategy, which puts it through every test that all strategies pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from memfold.backbones import MLP
from memfold.backbones.vit import ViT
from memfold.strategies import strategy_class
from memfold.strategies.sharing.base import SharingStrategy
from strategies.causal import CausalViT


@dataclass(frozen=True)
class Case:
    """What tests have to know of a strategy."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options under which it fits small models and short trainings."""
    ratio: float = 0.4
    """The ratio for the small models of `models.py`, unless the strategy has one of its own."""
    trains_dense: bool = False
    """Whether it trains as many numbers as the dense model has, at least for a time."""
    needs_widths: bool = False
    """Whether it is for backbones that can be built narrower, and refuses all of `models.py`."""
    budget_bytes: int = 12_000
    """For the MLP in `test_conformance.py`."""
    overrides: tuple[str, ...] = ()
    """Of its training."""
    hidden_widths: tuple[int, ...] = (256, 256)
    """Of that MLP: layers share with layers of equal shapes."""
    transformer_depth: int = 0
    """Blocks of a vision transformer, which takes the place of that MLP where layers have to have a
    stream or an MLP of their own."""
    causal: bool = False
    """Whether a patch in that transformer sees those before it alone."""
    needs_layers: bool = False
    """Whether it is for networks of equal layers, which none of `models.py` is."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Models of `models.py` that it cannot compress: name -> part of the message."""


SPARSE_REFUSE = {"weight_norm": "0.weight is computed from"}
ZERO_SCORES = {"zero_head": "every score is zero"}
# Coefficients and factors have other lengths than weights, which plain SGD does not know.
ADAM = ("optimizer=adamw", "optimizer.lr=0.003")
# With 0.4, one rank takes more of a tiny matrix; data and scores may leave a layer with nothing.
STRATEGIES = {
    "dense": Case(trains_dense=True),
    "stable_rps": Case(),
    # Small models build their weights whole: one strategy keeps the other way in these tests.
    "roast": Case({"tile_rows": 2, "tile_columns": 3, "autograd": "lean"}),
    "hashednet": Case(),
    "rand": Case(refused=SPARSE_REFUSE),
    "mag": Case(refused=SPARSE_REFUSE),
    "snip": Case(ratio=0.6, refused=SPARSE_REFUSE | ZERO_SCORES),
    "grasp": Case({"absolute": True}, ratio=0.6, refused=SPARSE_REFUSE | ZERO_SCORES),
    "synflow": Case({"rounds": 10}, ratio=0.6, refused=SPARSE_REFUSE | ZERO_SCORES),
    "ltr": Case({"fraction": 0.5}, trains_dense=True, refused=SPARSE_REFUSE),
    "set": Case({"update_every": 5}, refused=SPARSE_REFUSE),
    "rigl": Case({"update_every": 5}, refused=SPARSE_REFUSE),
    "supermask": Case(ratio=0.6, trains_dense=True, refused=SPARSE_REFUSE),
    "small": Case(needs_widths=True),
    "low_rank": Case(ratio=0.6),
    "subspace": Case(),
    "tied": Case(needs_layers=True, hidden_widths=(256,) * 6, budget_bytes=400_000),
    "tied_rps": Case(
        {"map": "albert", "loops": 4},
        ratio=0.3,
        needs_layers=True,
        hidden_widths=(256,) * 8,
        budget_bytes=60_000,
    ),
    "recursive_lora": Case(
        {"loops": 7},
        ratio=0.7,
        overrides=ADAM,
        needs_layers=True,
        hidden_widths=(256,) * 8,
        budget_bytes=400_000,
    ),
    "masa": Case(
        {"include": ["*"]},
        overrides=ADAM,
        needs_layers=True,
        hidden_widths=(256,) * 6,
        budget_bytes=400_000,
    ),
    "basis": Case(
        overrides=ADAM, needs_layers=True, hidden_widths=(256,) * 6, budget_bytes=100_000
    ),
    "hyperloop": Case(
        {"loops": 8, "copies": 2},
        overrides=ADAM,
        needs_layers=True,
        transformer_depth=18,
        budget_bytes=280_000,
    ),
    # Noise is not the same on two ranks, and each balances what it has.
    "widenet": Case(
        {"noise": 0.0, "balance": 0.0},
        overrides=ADAM,
        needs_layers=True,
        transformer_depth=8,
        budget_bytes=100_000,
    ),
    "mor": Case(
        {"loops": 8},
        overrides=ADAM,
        needs_layers=True,
        transformer_depth=18,
        causal=True,
        budget_bytes=280_000,
    ),
}

ANY_MODULE = tuple(
    sorted(n for n, case in STRATEGIES.items() if not case.needs_widths and not case.needs_layers)
)
"""Strategies for any module."""

INITIALISING = tuple(name for name in STRATEGIES if strategy_class(name).initialises)
"""Strategies whose weights are drawn anew, and for models without values, too."""

SHARING = tuple(name for name in ANY_MODULE if issubclass(strategy_class(name), SharingStrategy))
"""Of these, those with one vector."""


def network_for(
    name: str, in_channels: int, image_size: int, num_classes: int, widths: Sequence[int]
) -> nn.Module:
    """Build an MLP of these widths, or the network that the strategy needs in its place."""
    case = STRATEGIES.get(name, Case())
    if case.transformer_depth:
        sizes = {"width": 8, "depth": case.transformer_depth, "num_heads": 2}
        if case.causal:
            return CausalViT(in_channels, image_size, num_classes, **sizes)
        return ViT(in_channels, image_size, num_classes, patch_size=image_size, **sizes)
    if case.needs_layers:
        widths = (widths[0],) * len(case.hidden_widths)
    return MLP(in_channels, image_size, num_classes, hidden_widths=widths)


def options_of(name: str, *, ratio: float | None = None) -> dict[str, Any]:
    """Return a strategy's options, the ratio included: that of its row, or `ratio`."""
    case = STRATEGIES.get(name, Case())
    if strategy_class(name).ratios == "one":
        return dict(case.options)
    return {**case.options, "ratio": case.ratio if ratio is None else ratio}
