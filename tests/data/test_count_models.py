"""Counts against a dictionary."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfold.data.text.count_models import bits_per_byte


def slow(train: bytes, text: bytes, order: int) -> float:
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for length in range(order + 1):
        for place in range(length, len(train)):
            counts[train[place - length : place]][train[place]] += 1
    joined, total = train + text, 0.0
    for place in range(len(train), len(joined)):
        probability = 1 / 256
        for length in range(order + 1):
            seen = counts.get(joined[place - length : place], Counter())
            kinds, size = len(seen), sum(seen.values())
            if size:
                probability = (seen[joined[place]] + kinds * probability) / (size + kinds)
        total -= math.log2(probability)
    return total / len(text)


@given(st.binary(min_size=8, max_size=60), st.binary(min_size=1, max_size=30), st.integers(0, 4))
def test_counts_are_those_of_a_dictionary(train: bytes, text: bytes, order: int) -> None:
    train, text = (bytes(byte % 5 for byte in x) for x in (train, text))
    assert bits_per_byte(train, text, order) == pytest.approx(slow(train, text, order), rel=1e-9)


def test_what_was_never_seen_costs_what_the_mixture_leaves() -> None:
    assert bits_per_byte(b"a" * 99, b"b", 0) == pytest.approx(-math.log2((1 / 256) / 100))
