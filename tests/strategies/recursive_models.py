"""Small models whose tokens go through loops more or less often."""

import torch

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of

DEPTH, WIDTH, LENGTH, LOOPS = 8, 16, 12, 3
MAP = [0, 1, 2, 1, 2, 1, 2, 3]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ROUTER = "recursion_router"
KINDS = ("expert", "token")


def gpt(depth=DEPTH, positions="rotary"):
    torch.manual_seed(0)
    return GPT(23, LENGTH, width=WIDTH, depth=depth, num_heads=2, positions=positions).double()


def tokens(rows=3):
    return torch.randint(0, 23, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def mor(model=None, **options):
    """Compress, with weights and a router that tell tokens apart."""
    model = memfold.compress(gpt() if model is None else model, "mor", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name and "head" not in name:
                parameter.mul_(3)
        getattr(model, ROUTER).mul_(30)
    return model


def chosen_in(model, rows=None):
    """Return which tokens each loop takes, (loops, B, T), as the model says."""
    hooks, seen = compression_of(model).hooks, []
    first = [layers[0] for layers in hooks.loops]
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append(hooks.kept.tokens.chosen))
        for layer in first
    ]
    with torch.no_grad():
        model(tokens() if rows is None else rows)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)
