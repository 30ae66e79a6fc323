"""Layer densities solve their equation, and counts add up."""

from math import prod
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.pruning.densities import Distribution, layer_counts, layer_densities
from reference.pruning import erk_densities

CONV_NET = [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (10, 64)]
SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
)
SHARES = st.floats(0.001, 1)
DISTRIBUTIONS = get_args(Distribution)
KINDS = st.sampled_from(DISTRIBUTIONS)


def count_of(shapes, share):
    return max(1, round(share * sum(map(prod, shapes))))


@given(SHAPES, SHARES, KINDS, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_densities_solve_the_equation(shapes, share, kind, power):
    count = count_of(shapes, share)
    densities = layer_densities(shapes, count, kind, power_scale=power)
    kept = sum(density * prod(shape) for density, shape in zip(densities, shapes, strict=True))
    assert kept == pytest.approx(count)
    assert all(0 < density <= 1 + 1e-12 for density in densities)


@given(SHAPES, SHARES, st.sampled_from([0.5, 1.0]))
def test_erk_is_the_solution_found_by_bisection(shapes, share, power):
    count = count_of(shapes, share)
    found = layer_densities(shapes, count, "erk", power_scale=power)
    expected = erk_densities(shapes, count, power)
    assert found == pytest.approx(expected, rel=1e-6)


@given(SHAPES, SHARES, st.sampled_from(["er", "erk"]))
def test_power_zero_is_uniform(shapes, share, kind):
    count = count_of(shapes, share)
    uniform = count / sum(map(prod, shapes))
    found = layer_densities(shapes, count, kind, power_scale=0)
    assert found == pytest.approx([uniform] * len(shapes))
    assert layer_counts(shapes, count, kind, power_scale=0) == layer_counts(
        shapes, count, "uniform"
    )


@given(SHAPES, SHARES, KINDS)
def test_counts_are_exact_and_no_layer_is_left_empty(shapes, share, kind):
    count = count_of(shapes, share)
    counts = layer_counts(shapes, count, kind)
    assert sum(counts) == count
    assert all(0 <= kept <= prod(shape) for kept, shape in zip(counts, shapes, strict=True))
    if count >= len(shapes):
        assert min(counts) >= 1
    exact = [
        density * prod(shape)
        for density, shape in zip(layer_densities(shapes, count, kind), shapes, strict=True)
    ]
    if min(exact) >= 1:  # the rounding of one layer is at most that of all others
        bound = max(1, len(shapes) / 2) + 1e-6
        assert all(abs(kept - n) <= bound for kept, n in zip(counts, exact, strict=True))


@settings(max_examples=30)
@given(SHAPES, KINDS)
def test_a_larger_count_takes_nothing_and_gives_to_who_is_next_in_line(shapes, kind):
    sizes = [prod(shape) for shape in shapes]
    dims = [shape[:2] if kind == "er" else shape for shape in shapes]
    raw = [1 if kind == "uniform" else sum(d) / prod(d) for d in dims]
    shares = [n * share for n, share in zip(sizes, raw, strict=True)]
    counts = [0] * len(shapes)
    for count in range(1, min(sum(sizes), 60) + 1):
        before, counts = counts, layer_counts(shapes, count, kind)
        (grown,) = (i for i in range(len(shapes)) if counts[i] != before[i])
        assert counts[grown] == before[grown] + 1
        if count > len(shapes):
            places = [
                (before[i] + 0.5) / shares[i] for i in range(len(shapes)) if before[i] < sizes[i]
            ]
            assert (before[grown] + 0.5) / shares[grown] == pytest.approx(min(places))


@given(SHAPES, KINDS)
def test_everything_is_kept_at_density_one(shapes, kind):
    sizes = [prod(shape) for shape in shapes]
    assert layer_counts(shapes, sum(sizes), kind) == sizes


def test_erk_of_a_small_conv_net():
    count = round(0.2 * sum(map(prod, CONV_NET)))
    densities = layer_densities(CONV_NET, count, "erk")
    assert densities == pytest.approx([1, 0.583, 0.414, 0.195, 0.128, 1], abs=1e-3)


def test_er_looks_at_channels_only():
    shapes = [(20, 30, 3, 3), (40, 50, 1, 1)]
    first, second = layer_densities(shapes, 500, "er")
    assert first / second == pytest.approx((50 / 600) / (90 / 2000))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_dense_first_layer_is_paid_for_by_the_others(kind):
    counts = layer_counts(CONV_NET, 6000, kind, dense_first=True)
    assert counts[0] == 432
    assert sum(counts) == 6000
    assert layer_counts([(4, 5)], 7, kind, dense_first=True) == [7]
    assert layer_counts(CONV_NET, 437, kind, dense_first=True) == [432, 1, 1, 1, 1, 1]
    with pytest.raises(InputError, match=r"dense_first=true keeps the 432 weights .* 436 weights"):
        layer_densities(CONV_NET, 436, kind, dense_first=True)
