"""The search for widths, against a loop over all of them."""

from itertools import pairwise, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.width_search import Limits, find_widths


def chain(widths):
    """Weights of an MLP from 3 inputs to 2 outputs."""
    return sum(a * b for a, b in pairwise((3, *widths, 2)))


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
    st.floats(0.02, 1),
    st.sampled_from([0.0, 0.02]),
)
def test_the_search_finds_widths_where_a_loop_over_all_does(dense, ratio, above):
    target = round(ratio * chain(dense))
    assume(target >= 1)
    limits = Limits(target, 0.98 * target, (1 + above) * target)
    every = product(*(range(1, width + 1) for width in dense))
    possible = [widths for widths in every if chain(widths) in limits]
    narrowest = chain((1,) * len(dense))
    if not possible and not above and narrowest <= target:  # a budget, which less of will do
        found = find_widths(dense, chain, limits, "budget", "bytes")
        assert narrowest <= chain(found) < limits.least
        return
    if not possible:
        with pytest.raises(InputError, match=r"out of reach|no widths were found"):
            find_widths(dense, chain, limits, "ratio", "weights")
        return
    found = find_widths(dense, chain, limits, "ratio", "weights")
    assert found in possible
    assert found == find_widths(dense, chain, limits, "ratio", "weights")


@given(
    st.lists(st.integers(40, 300), min_size=2, max_size=6).map(tuple),
    st.floats(0.1, 1),
    st.floats(1.05, 2),
)
def test_wider_budgets_give_larger_networks_close_to_a_uniform_scaling(dense, ratio, factor):
    assume(ratio * factor <= 1)
    sizes = []
    for share in (ratio, ratio * factor):
        target = round(share * chain(dense))
        limits = Limits(target, 0.98 * target, 1.02 * target)
        found = find_widths(dense, chain, limits, "ratio", "weights")
        sizes.append(chain(found))
        assert sizes[-1] in limits
        scale = sum(found) / sum(dense)
        for narrow, wide in zip(found, dense, strict=True):
            assert abs(narrow - scale * wide) <= 3
    assert sizes[0] < sizes[1]


def test_dense_widths_are_kept_when_they_fit() -> None:
    assert find_widths((5, 4), chain, Limits(chain((5, 4)), 0, 100), "r", "u") == (5, 4)
    assert find_widths((5, 4), chain, Limits(10**6, 980_000, 10**6), "r", "u") == (5, 4)


def test_narrow_layers_round_up_first() -> None:
    # 0.54 times these widths: 5.4 becomes 6, 54.0 stays.
    size = chain((6, 6, 54, 54))
    limits = Limits(size, 0.98 * size, 1.02 * size)
    assert find_widths((10, 10, 100, 100), chain, limits, "r", "u") == (6, 6, 54, 54)
