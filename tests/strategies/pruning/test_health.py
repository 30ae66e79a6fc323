"""Layers, units and live paths, against searches over all paths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memfold.compression.selection import select_weights
from memfold.strategies.pruning.health import measure
from reference.pruning import live_weights
from strategies.models import MODELS, build, make_input


def mlp(widths, activation=nn.ReLU):
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def names_of(model):
    return [weight.name for weight in select_weights(model)]


@given(st.integers(0, 10**6), st.floats(0.05, 1), st.sampled_from([nn.ReLU, nn.Tanh, nn.ReLU6]))
def test_live_weights_are_those_on_a_path(seed, share, activation):
    generator = torch.Generator().manual_seed(seed)
    model = mlp([4, 5, 3, 2], activation)
    masks = [torch.rand(shape, generator=generator) < share for shape in [(5, 4), (3, 5), (2, 3)]]
    health = measure(names_of(model), masks, model, torch.randn(2, 4))
    live = sum(int(layer.sum()) for layer in live_weights(masks))
    assert health.effective_density == live / 41
    counts = [int(mask.sum()) for mask in masks]
    assert list(health.densities.values()) == [counts[0] / 20, counts[1] / 15, counts[2] / 6]
    assert health.min_layer_count == min(counts)
    assert health.collapsed_layers == counts.count(0)
    rows = sum(not any(row) for mask in masks for row in mask.tolist())
    columns = sum(not any(row) for mask in masks for row in mask.T.tolist())
    assert health.dead_units == rows + columns


@pytest.mark.parametrize("name", sorted(MODELS))
def test_dense_masks_are_alive_in_every_kind_of_model(name):
    model, example = build(name), make_input(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = names_of(model)
    masks = [torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in names]
    health = measure(names, masks, model, example)
    assert health.dead_units == health.collapsed_layers == 0
    assert health.effective_density == 1
    none = measure(names, [torch.zeros_like(mask) for mask in masks], model, example)
    assert none.effective_density == 0
    assert none.collapsed_layers == len(masks)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_an_empty_residual_branch_is_dead_and_the_rest_lives():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 2, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(2)
            self.first = nn.Conv2d(2, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            return x + self.second(torch.relu(self.first(x)))

    model = Block()
    nn.init.constant_(model.norm.bias, -3.0)  # values of parameters do not matter
    names = ["stem.weight", "first.weight", "second.weight"]
    masks = [torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in names]
    masks[2][:] = False
    health = measure(names, masks, model, torch.randn(4, 1, 5, 5))
    assert health.collapsed_layers == 1
    assert health.min_layer_count == 0
    assert health.effective_density == 18 / (18 + 54 + 6)
    assert health.dead_units == 2 + 3


def test_depth_neither_overflows_nor_underflows():
    torch.manual_seed(0)
    model = mlp([64] * 61)
    masks = [torch.rand(64, 64) < 0.5 for _ in range(60)]
    health = measure(names_of(model), masks, model, torch.ones(1, 64))
    assert health.effective_density == sum(int(m.sum()) for m in masks) / (60 * 64 * 64)


def test_weights_that_only_see_padding_are_not_live():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))
    mask = [torch.ones(3, 2, 3, 3, dtype=torch.bool)]
    for size, live in ((1, 1), (2, 9), (4, 9)):
        health = measure(["0.weight"], mask, model, torch.ones(1, 2, size, size))
        assert health.effective_density == live / 9


def test_metrics_have_plain_names():
    model = mlp([2, 3, 2])
    masks = [torch.ones(3, 2, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]
    assert measure(names_of(model), masks, model, torch.ones(1, 2)).to_metrics() == {
        "structure/effective_density": 0.0,
        "structure/min_layer_count": 0.0,
        "structure/collapsed_layers": 1.0,
        "structure/dead_units": 5.0,
        "density/0.weight": 1.0,
        "density/2.weight": 0.0,
    }
