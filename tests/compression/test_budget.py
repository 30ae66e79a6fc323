"""A budget is the size of the file: never exceeded, and used up."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.backbones import MLP
from memfold.compression.budget import Budget, Stored, share_budget
from memfold.compression.selection import select_weights
from memfold.errors import InputError
from memfold.quantisation import BITS, BLOCK_SIZES
from memfold.strategies import strategy_class
from memfold.strategies.sharing.shared_vector import stored_like
from memfold.strategies.sharing.stable_rps import StableRPS
from strategies.cases import SHARING, STRATEGIES

# Layers in common go by larger steps: tests/strategies/layers/.
BUDGETED = tuple(
    name
    for name, case in STRATEGIES.items()
    if strategy_class(name).ratios != "one" and not case.needs_layers
)
# The lottery tickets are trained before they have the budget's size; widths have large steps.
AT_ONCE = tuple(name for name in BUDGETED if name not in ("ltr", "small"))


def network() -> MLP:
    torch.manual_seed(0)
    return MLP(1, 5, 7, hidden_widths=[40, 30])


def fit(strategy: str, budget: int, **options: Any) -> nn.Module:
    batch = torch.randn(8, 1, 5, 5), torch.arange(8) % 7
    given = {**STRATEGIES[strategy].options, "budget_bytes": budget, **options}
    return memfold.compress(network(), strategy, data=[batch], loss=F.cross_entropy, **given)


def left_over(strategy: str, bits: int) -> float:
    """Bytes that may be left: less than what the strategy can add, and the steps of a header."""
    unit = {"low_rank": (30 + 40) * bits / 8, "supermask": 6}.get(strategy, bits / 8)
    return unit + 2 + (0 if strategy in SHARING else 4) + 12


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 3])
@pytest.mark.parametrize("strategy", AT_ONCE)
def test_a_file_fills_its_budget(strategy: str, bits: int, tmp_path: Path) -> None:
    budgets = (1100, 1150) if strategy == "supermask" else (1600, 1790)
    for budget, block_size in zip(budgets, (64, 16), strict=True):
        model = fit(strategy, budget, bits=bits, block_size=block_size)
        size = memfold.save(model, tmp_path / "a")
        assert budget - left_over(strategy, bits) < size <= budget
        coded = fit(strategy, budget, bits=bits, block_size=block_size, coding="huffman")
        assert memfold.save(coded, tmp_path / "a") <= budget


# Of so few weights, synflow leaves a layer without any, which it refuses.
@pytest.mark.parametrize("strategy", sorted({*AT_ONCE, "ltr"} - {"synflow"}))
def test_the_least_budget_is_the_one_that_the_error_says(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="budget_bytes=600 is too small") as caught:
        fit(strategy, 600)
    needed = int(re.findall(r"takes (\d+) bytes$", str(caught.value))[0])
    with pytest.raises(
        InputError,
        match=f"={needed - 1} is too small: .*, buffers, excluded weights.* takes {needed} bytes$",
    ):
        fit(strategy, needed - 1)
    size = memfold.save(fit(strategy, needed), tmp_path / "a")
    # The header, and so the size, goes up in steps; a ticket begins as the dense network.
    assert strategy == "ltr" or needed - 16 < size <= needed


@pytest.mark.parametrize("strategy", BUDGETED)
def test_a_budget_above_the_network_keeps_all_of_it(strategy: str) -> None:
    ratio = memfold.footprint(fit(strategy, 10**6)).ratio
    assert ratio == pytest.approx(0.5 if strategy == "supermask" else 1, abs=1e-3)


@given(st.integers(1000, 9000), st.sampled_from(BITS), st.sampled_from(BLOCK_SIZES))
def test_one_value_more_would_not_fit(limit: int, bits: int, block_size: int) -> None:
    strategy = StableRPS(budget_bytes=limit, bits=bits, block_size=block_size)
    model = network()
    weights = select_weights(model)
    budget, most = Budget(strategy, model, weights), sum(weight.numel for weight in weights)

    def choose(count: int) -> Stored:
        return stored_like(count, len(weights), torch.float32)

    found = budget.most(choose, 1, most, "1 shared value")
    assert budget.file_bytes(choose(found)) <= limit
    assert found == most or budget.file_bytes(choose(found + 1)) > limit


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_a_shared_budget_is_spent_exactly(sizes: list[int], fraction: float) -> None:
    total = len(sizes) + round(fraction * (sum(sizes) - len(sizes)))
    shares = share_budget(sizes, total)
    assert sum(shares) == total
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
