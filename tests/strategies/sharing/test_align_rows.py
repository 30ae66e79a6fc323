"""Rows of weights are kept whole where cutting them costs, if the loads stay even."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of


def make(rows=4096, columns=64, seed=0, **options):
    torch.manual_seed(seed)
    return memfold.compress(
        nn.Linear(columns, rows), "stable_rps", **{"ratio": 0.001, "autograd": "lean"} | options
    )


def aligns(model):
    return compression_of(model).strategy.align_rows


def test_a_model_whose_rows_are_aligned_by_itself_is_the_one_that_asks_for_it():
    model, asked = make(), make(align_rows=True)
    assert aligns(model) is True
    torch.testing.assert_close(model.state_dict(), asked.state_dict(), rtol=0, atol=0)
    assert torch.equal(model.weight, asked.weight)
    other = make(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(RuntimeError, match="mapping option"):
        make(align_rows=False).load_state_dict(model.state_dict())


def test_an_artifact_holds_what_was_chosen(tmp_path):
    model = make()
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", nn.Linear(64, 4096))
    assert aligns(loaded) is True
    assert torch.equal(loaded.weight, model.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.1},  # one row in 400 is cut
        {"rows": 256, "ratio": 0.006},  # a third of each partition would be left out
        {"rows": 400, "columns": 2000},  # rows are longer than the vector
        {"sign": "weight"},
        {"linear": "weight"},
        {"autograd": "classic"},
        {"autograd": "auto"},  # a small model, whose weights are built
    ],
)
def test_rows_are_cut_where_that_costs_nothing_or_loads_would_be_uneven(options):
    model, cut = make(**options), make(**options, align_rows=False)
    assert aligns(model) is False
    assert torch.equal(model.weight, cut.weight)


def test_the_weights_of_a_large_model_are_aligned_without_any_option():
    model = make(rows=1 << 15, ratio=0.0003, autograd="auto")
    assert aligns(model) is True
