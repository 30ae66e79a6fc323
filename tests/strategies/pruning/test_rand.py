"""Random pruning spreads evenly and stores its seed: other positions are refused."""

import math

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 30), nn.Linear(30, 4))


def masks_of(model):
    return compression_of(model).masks()


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rand_spreads_as_draws_without_replacement():
    share = 0.1
    sizes = [300 * 200, 200 * 100, 100 * 10]
    for seed in range(3):
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100), nn.Linear(100, 10))
        memfold.compress(model, "rand", ratio=share, seed=seed)
        counts = [int(m.sum()) for m in masks_of(model)]
        for kept, size in zip(counts, sizes, strict=True):
            deviation = math.sqrt(size * share * (1 - share) * (1 - size / sum(sizes)))
            assert abs(kept - size * share) < 5 * deviation
        for mask in masks_of(model)[:2]:  # within a layer too: rows and columns are alike
            rows = mask.double().mean(1)
            spread = math.sqrt(share * (1 - share) / mask.shape[1])
            assert ((rows - share).abs() < 5 * spread).all()


def test_rand_of_many_rounds_can_be_loaded(tmp_path):
    # The seed draws the mask of one round.
    shapes = ((1, 4), (6, 1), (3, 4), (1, 2), (3, 4), (1, 2))

    def build():
        return nn.ModuleList([nn.Linear(*shape) for shape in shapes])

    for ratio in (0.05, 0.1, 0.3):
        options = {"ratio": ratio, "rounds": 60, "scope": "layer", "schedule": "linear"}
        model = memfold.compress(build(), "rand", **options)
        memfold.save(model, tmp_path / "model.safetensors")
        loaded = memfold.load(tmp_path / "model.safetensors", build())
        assert equal(masks_of(loaded), masks_of(model))


@pytest.mark.parametrize(("other", "options"), [("rand", {"seed": 9}), ("mag", {})])
def test_rand_refuses_positions_that_its_seed_does_not_draw(other, options):
    state = memfold.compress(mlp(), other, ratio=0.3, **options).state_dict()
    model = memfold.compress(mlp(), "rand", ratio=0.3)
    before = masks_of(model)
    with pytest.raises(RuntimeError, match="belong to another seed, ratio or strategy"):
        model.load_state_dict(state)
    assert equal(masks_of(model), before)
