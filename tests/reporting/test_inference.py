"""Intervals, paired tests and Holm's correction, against scipy, by hand, and as properties."""

import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from memfold.reporting.inference import half_width, holm, paired_p_value

ACCURACIES = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=8)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(ACCURACIES)
def test_the_interval_is_that_of_scipy(values):
    std, count = statistics.stdev(values), len(values)
    assume(std > 0)
    mean = statistics.fmean(values)
    low, high = stats.t.interval(0.95, count - 1, mean, std / math.sqrt(count))
    half = half_width(std, count)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_the_interval_of_three_seeds_by_hand():
    # The 97.5 % quantile of t with two degrees of freedom is sqrt(2) 0.95 / sqrt(1 - 0.95^2).
    quantile = math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2)
    assert half_width(0.3, 3) == pytest.approx(quantile * 0.3 / math.sqrt(3))
    assert half_width(None, 1) is None
    assert half_width(0.0, 3) == 0


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=8))
def test_the_paired_test_is_that_of_scipy(pairs):
    one, other = ([value / 1000 for value in values] for values in zip(*pairs, strict=True))
    assume(len({a - b for a, b in pairs}) > 1)
    found = paired_p_value(dict(enumerate(one)), dict(enumerate(other)))
    assert found == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert found == paired_p_value(dict(enumerate(other)), dict(enumerate(one)))


def test_a_paired_test_by_hand():
    # Differences 1, 2, 3: t = 2 sqrt(3), and with two degrees of freedom p = 1 - t / sqrt(2 + t^2).
    one, other = {1: 11.0, 2: 22.0, 3: 33.0, 9: 0.0}, {3: 30.0, 2: 20.0, 1: 10.0, 8: 5.0}
    t = 2 * math.sqrt(3)
    assert paired_p_value(one, other) == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_pairing_sees_what_all_seeds_have_in_common():
    hard = {1: 0.80, 2: 0.85, 3: 0.90}
    better = {
        seed: value + more for (seed, value), more in zip(hard.items(), (10, 11, 12), strict=True)
    }
    assert paired_p_value(hard, better) < 0.01


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({1: 0.5}, {1: 0.7}),
        ({1: 0.5, 2: 0.6}, {3: 0.5, 4: 0.6}),
        ({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6}),
        ({1: 0.5, 2: 0.6, 3: 0.3}, {1: 0.6, 2: 0.7, 3: 0.4}),  # but for rounding
    ],
)
def test_without_pairs_or_spread_there_is_no_test(one, other):
    assert paired_p_value(one, other) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.02]) == pytest.approx([0.5, None, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_is_between_each_p_value_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) or math.isclose(p, q)
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


@given(P_VALUES, st.floats(0.001, 0.5))
def test_holm_rejects_what_the_stepwise_procedure_does(p_values, level):
    assume(all(not math.isclose(p * k, level) for p in p_values for k in range(1, 13)))
    rejected = set()
    for rank, (p, place) in enumerate(sorted((p, i) for i, p in enumerate(p_values))):
        if p > level / (len(p_values) - rank):
            break
        rejected.add(place)
    assert rejected == {i for i, q in enumerate(holm(p_values)) if q <= level}
