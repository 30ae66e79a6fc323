"""Models without values, and how they become compressed ones."""

import re

import pytest
import torch
from torch import nn

import memfold
from memfold.errors import InputError


def on_meta(build):
    with torch.device("meta"):
        return build()


def folded(model, strategy="stable_rps", **options):
    torch.manual_seed(5)
    return memfold.compress(model, strategy, **options)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def refusal(message):
    return pytest.raises(InputError, match=re.escape(message))


def tensors_of(model):
    return [
        (name, id(tensor))
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    ]


class LeavesItsScale(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("table", torch.arange(3), persistent=False)
