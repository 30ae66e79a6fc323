"""Trained weights that a strategy does not start from are worth a warning; fresh ones are not."""

import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.backbones import CNN
from memfold.compression import Context
from memfold.compression.selection import select_weights
from memfold.compression.trained_values import report_loss
from strategies.cases import INITIALISING, options_of


def build(hidden=64):
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def trained(steps=100):
    """Train on small images; pixels at the border do not matter."""
    images, digits = load_digits(n_class=10, return_X_y=True)
    x, y = torch.tensor(images[:512] / 16, dtype=torch.float32), torch.tensor(digits[:512])
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", [*INITIALISING, "supermask"])
def test_trained_weights_that_are_lost_are_worth_a_warning(name):
    fresh = build()
    fresh.load_state_dict(trained().state_dict())
    with pytest.warns(UserWarning, match="these weights have been trained, as it seems") as caught:
        memfold.compress(fresh, name, **options_of(name, ratio=0.1))
    assert len(caught) == 1
    assert name in str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "ratio"), [("stable_rps", 1.0), ("mag", 0.5), ("rand", 0.5), ("low_rank", 0.5)]
)
def test_weights_that_are_kept_are_not(name, ratio):
    memfold.compress(trained(), name, ratio=ratio)


def test_an_artifact_goes_into_a_trained_model(tmp_path):
    memfold.save(memfold.compress(build(), "stable_rps", ratio=0.1), tmp_path / "a.safetensors")
    memfold.load(tmp_path / "a.safetensors", trained())


def _blocks(tensor):
    """Scale rows in blocks, as packed projections may start."""
    return nn.init.normal_(tensor).mul_(torch.tensor([1.0, 0.1]).repeat(32).view(-1, 1))


@pytest.mark.parametrize(
    "draw",
    [
        nn.init.uniform_,
        nn.init.kaiming_normal_,
        nn.init.trunc_normal_,
        nn.init.orthogonal_,
        lambda tensor: nn.init.sparse_(tensor, 0.5),
        lambda tensor: tensor.copy_(torch.distributions.Laplace(0.0, 1.0).sample(tensor.shape)),
        _blocks,
    ],
    ids=["uniform", "kaiming", "truncated", "orthogonal", "sparse", "laplace", "blocks"],
)
def test_fresh_draws_are_not(draw):
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            layers = nn.Linear(64, 64), nn.Linear(40, 64)
            for layer in layers:
                draw(layer.weight)
            report_loss(select_weights(nn.Sequential(*layers)), Context(), "lost")


def test_padding_tables_of_one_value_and_small_matrices_are_not():
    constant = nn.Linear(16, 16)
    nn.init.constant_(constant.weight, 0.5)
    table = nn.Embedding(30, 16, padding_idx=0)
    model = nn.Sequential(table, constant, nn.Linear(3, 20), CNN(1, 8, 10))
    report_loss(select_weights(model), Context(), "lost")


def test_trained_bfloat16_weights_are_seen_beside_an_orthogonal_one():
    orthogonal = nn.Linear(16, 16)
    nn.init.orthogonal_(orthogonal.weight)
    model = nn.Sequential(trained(), orthogonal).bfloat16()
    with pytest.warns(UserWarning, match="trained"):
        report_loss(select_weights(model), Context(), "lost")
