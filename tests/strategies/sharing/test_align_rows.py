"""Rows of weights are kept whole where cutting them costs, if the loads stay even."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of


def make(rows=1 << 15, columns=64, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows).to(dtype)
    return memfold.compress(layer, "stable_rps", **{"ratio": 0.0003} | options)


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
    loaded = memfold.load(tmp_path / "model.safetensors", nn.Linear(64, 1 << 15))
    assert aligns(loaded) is True
    assert torch.equal(loaded.weight, model.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.01},  # one row in 330 is cut
        {"rows": 4200, "columns": 300, "ratio": 0.0004},  # two fifths of a partition would be empty
        {"rows": 600, "columns": 2000, "ratio": 0.001},  # rows are longer than the vector
        {"sign": "weight"},
        {"rows": 1 << 13},  # a small model, whose weights are built
    ],
)
def test_rows_are_cut_where_that_costs_nothing_or_loads_would_be_uneven(options):
    model, cut = make(**options), make(**options, align_rows=False)
    assert aligns(model) is False
    assert torch.equal(model.weight, cut.weight)


def test_how_weights_are_computed_and_their_dtype_decide_nothing():
    model = make()
    for options in ({"autograd": "classic"}, {"linear": "weight"}, {"autograd": "whole"}):
        other = make(**options)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.weight, model.weight)
    assert aligns(make(dtype=torch.float64)) is aligns(make(dtype=torch.float16)) is True
