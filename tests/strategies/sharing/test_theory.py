"""The statements of docs/theory.md that no other test makes, against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.strategies.sharing.gradient_scale import slot_factors
from memfold.strategies.sharing.hashednet import ElementMapping
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.random_fold import RandomFold
from reference.sharing import explicit_map

ROWS = 6


def two_layers(kind, num_slots, seed=1):
    spans = [
        Span(name, torch.Size([ROWS, ROWS]), start, start + ROWS**2)
        for name, start in (("first", 0), ("second", ROWS**2))
    ]
    return kind(spans, num_slots, seed=seed, sign="weight")


def stable_rate(mapping, scales, hessian, gradient_scale, initial_scale=None):
    """Return 2 / the largest eigenvalue of gradient descent on phi."""
    factors = slot_factors(mapping, scales, initial_scale, gradient_scale, torch.float64)
    ones = torch.ones(mapping.num_slots, dtype=torch.float64)
    forward, backward = (mapping.scale(ones, factor) for factor in factors)
    layers = torch.tensor(scales, dtype=torch.float64).repeat_interleave(ROWS**2)
    read = layers[:, None] * explicit_map(mapping) * forward
    taught = layers[:, None] * explicit_map(mapping) * backward
    largest = torch.linalg.eigvals(taught.T @ hessian @ read).real.max()
    return 2 / float(largest)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([RandomFold, ElementMapping]),
    st.integers(4, 2 * ROWS**2),
    st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    st.integers(0, 5),
)
def test_what_is_stable_for_the_dense_model_is_stable_for_projection(kind, m, scales, seed):
    mapping = two_layers(kind, m)
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2 * ROWS**2, 9, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    dense = 2 / float(torch.linalg.eigvalsh(hessian)[-1])
    projection = stable_rate(mapping, scales, hessian, "projection")
    assert projection >= dense * (1 - 1e-9)
    # Neither the layers' scales nor that of phi change it.
    assert stable_rate(mapping, scales, hessian, "projection", 0.04) == pytest.approx(projection)
    largest_load = float(mapping.accumulate([1.0, 1.0]).max())
    length = stable_rate(mapping, scales, hessian, "length")
    assert length >= projection / largest_load**0.5 * (1 - 1e-9)
    assert length <= projection * (1 + 1e-9)
    # Without a gradient scale it grows as the square of the initial scale.
    none = [stable_rate(mapping, scales, hessian, "none", a) for a in (0.04, 0.4)]
    assert none[1] == pytest.approx(100 * none[0])


@pytest.mark.parametrize("kind", [RandomFold, ElementMapping])
@pytest.mark.parametrize("power", [0.0, -0.75])
def test_the_variance_of_inner_products_is_the_formula(kind, power):
    n, m, draws = 30, 8, 1500
    generator = torch.Generator().manual_seed(3)
    size = torch.arange(1, n + 1, dtype=torch.float64) ** power
    w, x = torch.randn(2, n, generator=generator, dtype=torch.float64) * size
    expected = 0.0
    for i in range(n):
        for j in range(n):
            never = i == j or (kind is RandomFold and i // m == j // m)
            if not never:
                expected += float(w[i] ** 2 * x[j] ** 2 + w[i] * x[i] * w[j] * x[j]) / m
    span = Span("weight", torch.Size([n]), 0, n)
    errors = []
    for seed in range(draws):
        mapping = kind([span], m, seed=seed, sign="weight")
        slots = torch.zeros(m, dtype=torch.float64)
        mapping.scatter(w, span, 1.0, slots)
        errors.append(mapping.gather(slots, span, 1.0) @ x - w @ x)
    squares = torch.stack(errors).square()
    uncertainty = float(squares.std()) / draws**0.5
    assert abs(float(squares.mean()) - expected) < 5 * uncertainty
    assert abs(float(torch.stack(errors).mean())) < 5 * (expected / draws) ** 0.5


def train(strategy, **options):
    """Return the losses of 60 steps on random images of four classes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    memfold.compress(model, strategy, ratio=0.2, seed=1, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = torch.randn(64, 16, dtype=torch.float64)
    y = torch.arange(64) % 4
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scale", [0.004, 0.4, 40.0])
def test_the_initial_scale_of_phi_changes_nothing_unless_nothing_scales_the_gradient(scale):
    fitting = train("stable_rps")
    assert fitting[-1] < fitting[0]
    assert train("stable_rps", initial_scale=scale) == pytest.approx(fitting, rel=1e-6)
    tile = {"tile_rows": 4, "tile_columns": 4}
    scaled = train("roast", **tile)
    assert train("roast", initial_scale=scale, **tile) == pytest.approx(scaled)
    published = train("roast", initial_scale=scale, gradient_scale="none", **tile)
    if scale == 0.004:
        assert not published[-1] < 10
    if scale == 40.0:  # as good as frozen: the biases alone are trained
        assert published[0] - published[-1] < 0.2 * (scaled[0] - scaled[-1])
