"""Hashes are exact, uniform and independent of how they are evaluated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.strategies.sharing.hashing import HASH_RANGE, PolynomialHash, RangeHash, scale_below

PRIME = 2**31 - 1


def exact_polynomial(coefficients, key):
    """The definition, in Python's unbounded integers."""
    high, *polynomial = coefficients
    x = ((key % 2**31) + high * (key >> 31)) % PRIME
    value = 0
    for coefficient in polynomial:
        value = (value * x + coefficient) % PRIME
    return value


@given(st.integers(0, 2**62 - 1), st.integers(0, 10**6))
def test_polynomial_equals_unbounded_arithmetic(key, seed):
    hashed = PolynomialHash(seed)
    expected = exact_polynomial(hashed._coefficients, key)
    assert int(hashed(key)) % PRIME == expected
    assert int(hashed(np.array([key]))[0]) == int(hashed(torch.tensor([key]))[0]) == hashed(key)
    assert 0 <= hashed(key) < HASH_RANGE


@given(st.integers(0, 3 * 4096), st.integers(1, 9000))
def test_range_hash_does_not_depend_on_where_a_range_begins(start, length):
    hashed = RangeHash(5, "test")
    whole = hashed(0, start + length, torch.device("cpu"))
    assert torch.equal(hashed(start, start + length, torch.device("cpu")), whole[start:])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["polynomial", "range"])
def test_slots_and_signs_are_uniform_and_independent(kind, seed):
    keys = 200_000
    slots, cells = 50, 100
    if kind == "polynomial":
        slot_values = PolynomialHash(seed, "slot")(torch.arange(keys))
        sign_values = PolynomialHash(seed, "sign")(torch.arange(keys))
    else:
        slot_values = RangeHash(seed, "slot")(0, keys, torch.device("cpu"))
        sign_values = RangeHash(seed, "sign")(0, keys, torch.device("cpu"))
    joint = scale_below(slots, slot_values) * 2 + (sign_values >> 30)
    counts = torch.bincount(joint, minlength=cells).double()
    chi_square = float(((counts - keys / cells) ** 2 / (keys / cells)).sum())
    # 99 degrees of freedom: mean 99, standard deviation 14; six of them either way.
    assert 99 - 84 < chi_square < 99 + 84
