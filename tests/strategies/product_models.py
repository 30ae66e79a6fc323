"""Models with layers that may do without their weights, and what they compute; no test here."""

import torch
from torch import nn


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        tokens = (x.sum(-1).abs() * 10).long() % 13
        return self.head(torch.tanh(self.mix(self.embed(tokens)) + x[..., :1]))


def pointwise():
    """Convolutions of size 1 in one, two and three dimensions, and one that is none."""
    return nn.Sequential(
        nn.Unflatten(2, (3, 4)),
        nn.Conv2d(4, 8, 1),
        nn.Tanh(),
        nn.Conv2d(8, 6, 1, stride=(1, 2), bias=False),
        nn.Conv2d(6, 6, 1, groups=2),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


def encoder():
    # Not ReLU: bfloat16 would move some of its inputs across the kink.
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 3))


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh())


MODELS = {"encoder": encoder, "perceptron": perceptron, "pointwise": pointwise, "tied": TiedHead}


def batch(dtype=torch.float64):
    return torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def loss_of(output):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return (weights * output).sum() + output.square().mean()


def results(model, autocast=False):
    x = batch(next(model.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        output = model(x)
    loss_of(output.float() if autocast else output).backward()
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        evaluated = model.eval()(x)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "evaluated": evaluated, "input": x.grad, **gradients}
