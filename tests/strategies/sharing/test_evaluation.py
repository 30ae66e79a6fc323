"""Weights that are built once for an evaluation, and never stale."""

import copy
import gc

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.strategies.sharing.products.straddling import StraddlingRows
from strategies.sharing.lean_models import alive, batch, evaluate, make


def test_an_evaluation_builds_every_weight_once(built):
    model = make("transformer").eval()
    first = evaluate(model, batch())
    count = len(built)
    assert torch.equal(evaluate(model, batch()), first)
    assert len(built) == count == alive(built)
    model.train()
    model(batch())
    gc.collect()
    assert alive(built) == 0


def test_a_copy_that_is_only_evaluated_can_be_released(built):
    model = torch.optim.swa_utils.AveragedModel(make("transformer")).eval()
    first = evaluate(model, batch())
    assert alive(built) > 0
    memfold.release(model)
    assert alive(built) == 0
    assert torch.equal(evaluate(model, batch()), first)


def test_rows_that_a_partition_cuts_are_built_once_for_an_evaluation(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30)).double().eval()
    memfold.compress(model, "stable_rps", ratio=0.05, linear="correlation")
    counted = []
    build = StraddlingRows._build

    def watched(*arguments):
        counted.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(StraddlingRows, "_build", watched)
    x = torch.randn(3, 20, dtype=torch.float64)
    for _ in range(2):
        expected = evaluate(memfold.densify(model), x)
        counted.clear()
        torch.testing.assert_close(evaluate(model, x), expected)
        assert counted
        counted.clear()
        torch.testing.assert_close(evaluate(model, x), expected)
        assert not counted
        change_data(model)


def change_data(model):
    compression_of(model).values.data.mul_(1.5)


def change_in_place(model):
    with torch.no_grad():
        compression_of(model).values.mul_(1.5)


def load_state(model):
    state = model.state_dict()
    state["shared_values"] = state["shared_values"] * 1.5
    model.load_state_dict(state)


def load_scales(model):
    state = model.state_dict()
    state["shared_scales"] = state["shared_scales"] * 1.5
    model.load_state_dict(state)


def change_parameter(model):
    values = compression_of(model).values.detach().clone()
    model.shared_values = nn.Parameter(values * 1.5)


@pytest.mark.parametrize(
    "change", [change_data, change_in_place, load_state, load_scales, change_parameter]
)
def test_an_evaluation_is_never_stale(change):
    model = make("convolutions", initial_scale=0.1).eval()
    evaluate(model, batch())
    change(model)
    expected = memfold.densify(model)
    torch.testing.assert_close(evaluate(model, batch()), evaluate(expected, batch()))
    copied = copy.deepcopy(model)
    change(copied)
    assert not torch.allclose(evaluate(copied, batch()), evaluate(model, batch()))


def test_evaluation_under_inference_mode_and_no_grad():
    model = make("convolutions").eval()
    first = evaluate(model, batch())
    with torch.inference_mode():
        assert torch.equal(model(batch()), first)
    assert torch.equal(evaluate(model, batch()), first)
    model.train()
    model(batch()).sum().backward()
    assert compression_of(model).values.grad is not None
