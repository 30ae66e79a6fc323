"""Small models, data, and one way to call every score."""

from itertools import pairwise

import torch
from torch import nn

from memfold.compression.selection import select_weights
from memfold.strategies.pruning.scoring import grasp_scores, snip_scores, synflow_scores


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(5, 3),
    )


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


CASES = {"conv_net": (conv_net, (2, 6, 6)), "transformer": (transformer, (3, 8))}


def batches_of(shape, sizes=(7, 7, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), *shape, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def joined(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def named(model):
    return {weight.name: weight.tensor for weight in select_weights(model)}


def mlp(*widths, bias=False):
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


SCORERS = {
    "snip": lambda model, batches, loss: snip_scores(model, named(model), batches, loss),
    "grasp": lambda model, batches, loss: grasp_scores(model, named(model), batches, loss),
    "synflow": lambda model, batches, loss: synflow_scores(model, named(model), batches[0][0]),
}
