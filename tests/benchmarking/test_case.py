"""Cases measured in this process; the command gives each a process of its own."""

import pytest

from memfold.benchmarking.case import measure
from memfold.benchmarking.cases import Case


@pytest.mark.parametrize(("strategy", "ratio"), [("dense", None), ("stable_rps", 0.1)])
def test_a_case_is_measured(strategy: str, ratio: float | None) -> None:
    options = {"model": "mlp_tiny", "batch_size": 4, "threads": 1, "warmup": 1, "steps": 1}
    assert measure(Case(strategy=strategy, ratio=ratio, **options))["parameter_bytes"] > 0


def test_steps_in_turn_with_the_dense_model_give_quartiles_of_ratios():
    options = {"model": "mlp_tiny", "batch_size": 4, "threads": 1, "warmup": 1, "steps": 1}
    found = measure(Case(strategy="stable_rps", ratio=0.1, in_turn=8, **options))
    low, median, high = (found[f"turn_ratio{end}"] for end in ("_low", "", "_high"))
    assert 0 < low <= median <= high
