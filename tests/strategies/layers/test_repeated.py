"""Repeated layers are found by their structure, whatever they are called."""

from itertools import pairwise

import pytest
from torch import nn

import memfold
from memfold.backbones import GPT
from memfold.compression.selection import select_weights
from memfold.strategies.layers.repeated import repeated_layers, stack_of


class Experts(nn.Module):
    """Three layers, each with a longer list of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))})
            for _ in range(3)
        )


def encoder(num_layers=3):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers)


def perceptron():
    sizes = [6, 8, 8, 8, 8, 3]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


@pytest.mark.parametrize(
    ("model", "pattern", "paths"),
    [
        (encoder, None, ["layers.0", "layers.1", "layers.2"]),
        (perceptron, None, ["2", "4", "6"]),
        # The embedding and the head of so narrow a network are larger than its two blocks.
        (lambda: GPT(256, 8, width=16, depth=2), None, ["blocks.0", "blocks.1"]),
        (Experts, None, ["layers.0", "layers.1", "layers.2"]),
        (Experts, "layers.1.experts.*", [f"layers.1.experts.{i}" for i in range(8)]),
        (encoder, "layers.[01]", ["layers.0", "layers.1"]),
    ],
)
def test_the_longest_list_of_equal_layers_is_found_or_the_one_that_is_named(model, pattern, paths):
    assert list(repeated_layers(model(), pattern)) == paths


def test_weights_are_found_at_the_same_place_of_every_layer():
    model = encoder()
    weights = select_weights(model)
    stack = stack_of(model, weights, None)
    assert len(stack) == 3
    assert sorted(stack.weights) == sorted(
        [
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        ]
    )
    for name, numbers in stack.weights.items():
        assert [weights[i].name for i in numbers] == [
            f"layers.{layer}.{name}" for layer in range(3)
        ]


def tied_inside():
    model = encoder()
    model.layers[0].linear1.weight = model.layers[2].linear1.weight
    return model


def unequal():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 4))


def test_equal_layers_that_lie_apart_are_found_by_the_name_that_the_message_gives():
    def model():
        parts = {"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
        return nn.ModuleDict(
            {"one": nn.ModuleDict(parts), "two": nn.ModuleDict({"encoder": nn.Linear(4, 4)})}
        )

    with pytest.raises(memfold.InputError, match="has no repeated layers") as refused:
        memfold.compress(model(), "tied", ratio=0.5)
    pattern = str(refused.value).split("compression.layers='")[1].split("'")[0]
    assert list(repeated_layers(model(), pattern)) == ["one.encoder", "two.encoder"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (unequal, {}, "has no repeated layers"),
        (encoder, {"layers": "blocks.*"}, r"'blocks\.\*' names 0 modules, at least 2"),
        (unequal, {"layers": "?"}, "0 and 1 have parameters of other names or shapes"),
        (tied_inside, {}, "layers.0.linear1.weight, layers.2.linear1.weight are one tensor"),
        (encoder, {"include": ["layers.0"]}, "no compressible weight that each of them has"),
    ],
)
def test_models_without_equal_layers_are_refused(model, options, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(model(), "tied", ratio=0.5, **options)
