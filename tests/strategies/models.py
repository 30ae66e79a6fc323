"""Small models that own their weights in every way that PyTorch has."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.errors import InputError
from strategies.cases import STRATEGIES, options_of


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class RegisteredTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.again(torch.relu(self.first(x))))


class FunctionalWeights(nn.Module):
    """Parameters of its own, used without a layer."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 5) / 2)
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(3, 4)) for _ in range(2)])

    def forward(self, x):
        x = F.linear(x, self.matrix)
        return F.linear(x, self.parts[0]) + F.linear(x, self.parts[1])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        wide = self.attention.kdim != 8
        memory = torch.cat((x, x), dim=-1) if wide else x
        return self.attention(x, memory, memory)[0]


def _zero_head():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
    nn.init.zeros_(model[2].weight)
    return model


def _one_element():
    return nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 6), nn.Linear(6, 5))


def _tokens():
    return torch.tensor([[1, 2, 0, 5], [0, 10, 3, 3]])


def _images(channels, dims):
    return lambda: torch.randn(2, channels, *([6] * dims), dtype=torch.float64)


def _rows(width):
    return lambda: torch.randn(3, width, dtype=torch.float64)


def _sequence(width):
    return lambda: torch.randn(2, 5, width, dtype=torch.float64)


# name -> (build the model, make an input)
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), _rows(6)),
    "lone_layer": (lambda: nn.Linear(7, 5), _rows(7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), _images(4, 1)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding_mode="circular", padding=1), nn.BatchNorm2d(6)
        ),
        _images(3, 2),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), _images(2, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), _images(4, 1)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 6, 3), _images(3, 2)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 3), _images(2, 3)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), _images(4, 2)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), _images(4, 2)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)),
        _tokens,
    ),
    "attention": (Attention, _sequence(8)),
    "attention_projections": (lambda: Attention(kdim=16, vdim=16), _sequence(8)),
    "transformer_layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        _sequence(8),
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2
        ),
        _sequence(8),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), _sequence(4)),
    "gru": (lambda: Recurrent(nn.GRU), _sequence(4)),
    "tied": (TiedLanguageModel, _tokens),
    "registered_twice": (RegisteredTwice, _rows(5)),
    "functional": (FunctionalWeights, _rows(5)),
    "weight_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 4)
        ),
        _rows(5),
    ),
    "zero_head": (_zero_head, _rows(6)),
    "one_element": (_one_element, _rows(4)),
}


def build(name):
    torch.manual_seed(3)
    return MODELS[name][0]().double()


def make_input(name):
    torch.manual_seed(4)
    return MODELS[name][1]()


def compress(model, strategy, name, ratio=None):
    """Compress the model of that name, which `build` has made, with the options of its row."""
    x = make_input(name)
    return memfold.compress(
        model,
        strategy,
        seed=7,
        data=[(x, x)],
        loss=lambda output, _: output.square().mean(),
        **options_of(strategy, ratio=ratio),
    )


def compressed_or_skipped(strategy, name, ratio=None):
    """Build and compress a model; if the row says that it is refused, check that, and skip."""
    message = STRATEGIES[strategy].refused.get(name)
    if message is None:
        return compress(build(name), strategy, name, ratio)
    with pytest.raises(InputError, match=message):
        compress(build(name), strategy, name, ratio)
    pytest.skip(f"{strategy} refuses {name}, as it should")
