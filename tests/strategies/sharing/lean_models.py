"""Models whose weights are used in every way, and what is asked of them."""

import torch
from torch import nn

import memfold


class Recurrent(nn.Module):
    """A cell called once per step, and a kernel that takes all of its weights."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(6, 8)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        state, states = x.new_zeros(len(x), 8), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        output, _ = self.lstm(torch.stack(states, 1))
        return self.head(output[:, -1])


class Tied(nn.Module):
    """One tensor as embedding, as head, and once more by hand."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        tokens = (x.sum(-1).abs() * 10).long() % 7
        hidden = torch.tanh(self.mix(self.embed(tokens)))
        return self.head(hidden).mean(1) + hidden.mean(1) @ self.embed.weight.T.square()


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv2d(1, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 5 * 7, 3),
    )


def transformer():
    layer = nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten())


def perceptron_of_many_layers():
    layers = [nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(12)]
    return nn.Sequential(nn.Flatten(), *layers)


MODELS = {
    "perceptron_of_many_layers": perceptron_of_many_layers,
    "convolutions": convolutions,
    "recurrent": Recurrent,
    "tied": Tied,
    "transformer": transformer,
}


def make(name, strategy="stable_rps", ratio=0.2, dtype=torch.float64, **options):
    torch.manual_seed(3)
    if strategy == "roast":
        options |= {"tile_rows": 2, "tile_columns": 3}
    options = {"autograd": "lean"} | options
    return memfold.compress(MODELS[name]().to(dtype), strategy, ratio=ratio, **options)


def batch(dtype=torch.float64):
    return torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def loss_of(output):
    """A function of the output whose gradient no normalisation makes vanish."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return (weights * output).sum() + output.square().mean()


def evaluate(model, x):
    with torch.no_grad():
        return model(x)


def alive(built):
    return sum(reference() is not None for reference in built)
