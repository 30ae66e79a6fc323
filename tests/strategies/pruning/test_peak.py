"""What choosing masks keeps in memory, in units of the dense weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.strategies.pruning import masks
from memfold.strategies.pruning.masks import PackedMask
from strategies.pruning.allocations import peak_bytes

WIDTH = 128
NUM_LAYERS = 4
DENSE_BYTES = 4 * NUM_LAYERS * WIDTH**2


def some_of(scores, count):
    """Keep the first of each tensor: a choice that takes no memory."""
    masks = [PackedMask(score.shape, score.device) for score in scores]
    for mask in masks:
        part = torch.zeros(mask._shape.numel(), dtype=torch.bool)
        part[: count // len(masks)] = True
        mask.write(part.split(1 << 18))
    return masks


# The model itself, which is there before, is one more.
@pytest.mark.parametrize(
    ("method", "options", "limit"),
    [
        ("mag", {}, 1.5),  # scores, masks
        ("snip", {}, 2.5),  # a copy, the gradient, that of one layer for another batch
        ("synflow", {"rounds": 3}, 2.8),  # a float64 copy that becomes scores, one layer's gradient
        ("rigl", {}, 1.1),  # a permutation of one layer, masks
    ],
)
def test_scores_and_masks_take_little_beside_the_model(method, options, limit, monkeypatch):
    monkeypatch.setattr(masks, "_largest", some_of)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))
    data = [(torch.ones(2, WIDTH), torch.zeros(2, WIDTH))] * 2

    def compress():
        memfold.compress(model, method, ratio=0.1, data=data, loss=F.mse_loss, **options)

    assert peak_bytes(compress) < limit * DENSE_BYTES


@pytest.mark.parametrize("select", [masks.keep_largest, lambda s, n: masks.keep_counts(s, [n, n])])
def test_selection_makes_nothing_of_the_size_of_its_scores(select, monkeypatch):
    monkeypatch.setattr(masks, "_CHUNK", 1 << 10)
    monkeypatch.setattr(masks, "_DIGIT", 8)
    scores = [torch.linspace(0, 1, 1 << 14).view(2, -1) for _ in range(2)]
    assert peak_bytes(lambda: select(scores, 1000)) < scores[0].nbytes
