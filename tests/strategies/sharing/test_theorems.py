"""The theorems of parameter sharing hold for the default signs, on inputs as smooth as images.

W is one layer of a model, a matrix of rows; its sketch is what sharing keeps of it: every slot
the signed sum of its weights, every weight the signed value of its slot. The sketch is unbiased,
and the inner products of its rows with an input x are those of W up to a variance: at most

    (1/m) sum_r' (|x|^2 |w_r'|^2 + <x, w_r'>^2)

over all rows, whatever x is: twice that of signs of single weights, at most. One sign for a run of
neighbouring weights has no such bound: where neighbouring inputs are alike, its errors add up.
"""

import pytest
import torch

from memfold.strategies import strategy_class
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.random_fold import RandomFold
from memfold.strategies.sharing.roast import TileMapping

ROWS, COLUMNS, SLOTS = 6, 120, 80
DEFAULT = strategy_class("stable_rps").sign


def smooth(*shape):
    """Slow waves along the last dimension: neighbours are nearly equal."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(shape[-1]) / shape[-1]
    phases = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    return 1 + torch.sin(6.28 * (places + phases))


def mapping(sign, seed, shape=(ROWS, COLUMNS), slots=SLOTS, kind="fold"):
    size = torch.Size(shape)
    span = Span("weight", size, 0, size.numel())
    if kind == "tile":
        return TileMapping([span], slots, seed=seed, sign=sign, tile=(2, 20))
    return RandomFold([span], slots, seed=seed, sign=sign)


def sketch(weight, fold):
    """Return what sharing keeps of a tensor: S S^T w."""
    (span,) = fold.spans
    slots = torch.zeros(fold.num_slots, dtype=torch.float64)
    fold.scatter(weight.flatten(), span, 1.0, slots)
    return fold.gather(slots, span, 1.0).view(weight.shape)


def errors(sign, weight, inputs, *, transposed=False, draws=300, **options):
    """Of the sketches' inner products with each input: (draws, rows, inputs)."""
    found = []
    for seed in range(draws):
        difference = sketch(weight, mapping(sign, seed, weight.shape, **options)) - weight
        found.append((difference.T if transposed else difference) @ inputs)
    return torch.stack(found)


@pytest.mark.parametrize(("kind", "transposed"), [("fold", False), ("fold", True), ("tile", False)])
def test_inner_products_with_smooth_inputs(kind, transposed):
    # Layers store their weights either way: rows, or columns, are what meets the input.
    weight, inputs = smooth(ROWS, COLUMNS), smooth(4, COLUMNS).T
    lengths = inputs.square().sum(0) * weight.square().sum()
    bound = ((lengths + (weight @ inputs).square().sum(0)) / SLOTS).mean()
    stored = weight.T.contiguous() if transposed else weight
    options = {"transposed": transposed, "kind": kind}
    found = errors(DEFAULT, stored, inputs, **options)
    assert (found.mean(0).abs() < 5 * (bound / len(found)) ** 0.5).all()
    variance = found.square().mean()
    # 300 draws know it to about a tenth.
    assert variance < 1.2 * bound
    assert variance < 1.5 * errors("weight", stored, inputs, **options).square().mean()
    # What the default is there for: runs of neighbours with one sign.
    assert errors("run", stored, inputs, **options).square().mean() > 2 * variance


def test_the_norms_of_outputs_are_kept_at_the_start():
    # |W x|^2 of random shared weights is that of independent ones, and as certain.
    x = smooth(COLUMNS)
    generator = torch.Generator().manual_seed(1)
    spread = {}
    for sign in (DEFAULT, "weight", "run"):
        norms = []
        for seed in range(300):
            fold = mapping(sign, seed, (40, COLUMNS))
            slots = torch.randn(SLOTS, generator=generator, dtype=torch.float64)
            output = fold.gather(slots, fold.spans[0], COLUMNS**-0.5).view(40, COLUMNS) @ x
            norms.append(output.square().mean())
        relative = torch.stack(norms) / x.square().mean()
        assert abs(float(relative.mean()) - 1) < 5 * float(relative.std()) / 300**0.5
        spread[sign] = float(relative.std())
    assert spread[DEFAULT] < 1.3 * spread["weight"]
    assert spread["run"] > 1.5 * spread[DEFAULT]


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_models_on_smooth_inputs(transposed):
    # The best shared weights for smooth targets: which part of them is not explained.
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = noise.cumsum(1) / COLUMNS**0.5
    targets = inputs @ smooth(ROWS, COLUMNS).T
    shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    unexplained = {}
    for sign in (DEFAULT, "weight", "run"):
        residuals = []
        for seed in range(20):
            fold = mapping(sign, seed, shape)
            read = torch.stack(
                [fold.gather(basis, fold.spans[0], 1.0) for basis in torch.eye(SLOTS).double()]
            ).view(SLOTS, *shape)
            weights = read if transposed else read.transpose(1, 2)
            outputs = (inputs @ weights).flatten(1).T
            solved = torch.linalg.lstsq(outputs, targets.flatten()[:, None]).solution
            residuals.append((outputs @ solved - targets.flatten()[:, None]).square().sum())
        unexplained[sign] = float(torch.stack(residuals).mean() / targets.square().sum())
    # The rows of these targets resemble each other, the worst case of the bound above.
    assert unexplained[DEFAULT] < 3 * unexplained["weight"]
    assert unexplained["run"] > 8 * unexplained[DEFAULT]
