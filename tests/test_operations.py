"""Multiply-adds of a forward pass, against what one works out by hand."""

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.operations import forward_operations


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def gpt():
    return GPT(11, 7, width=8, depth=4, num_heads=2)


def convolution():
    return nn.Conv2d(3, 5, 3, stride=2)


OF_A_BLOCK = 7 * 12 * 8 * 8 + 2 * 7 * 7 * 8  # matrices and both products of attention


@pytest.mark.parametrize(
    ("build", "example", "count"),
    [
        (mlp, torch.ones(4, 8), 4 * (8 * 16 + 16 * 3)),
        (convolution, torch.ones(2, 3, 9, 9), 2 * 16 * 5 * 27),
        (gpt, torch.arange(7)[None], 4 * OF_A_BLOCK + 7 * 8 * 11),
        (Recurrent, torch.ones(1, 4, 5), 4 * 24 * (5 + 6)),
    ],
)
def test_what_one_counts_by_hand(build, example, count):
    model = build().train()
    model[2].eval() if build is mlp else None
    modes = [module.training for module in model.modules()]
    assert forward_operations(model, example) == count
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["tied", "masa", "basis", "recursive_lora", "low_rank"])
def test_what_builds_weights_counts_as_the_dense_model(name):
    example, dense = torch.arange(7)[None], forward_operations(gpt(), torch.arange(7)[None])
    model = memfold.compress(gpt(), name, ratio=0.7)
    assert forward_operations(model, example) == dense


def test_kept_values_count_as_many_as_they_are():
    layer = nn.Linear(64, 32, bias=False)
    model = memfold.compress(layer, "rand", ratio=0.125, linear="kept")
    assert forward_operations(model, torch.ones(8, 64)) == 8 * 64 * 32 // 8
