"""Hash functions that never overflow int64 and agree on every device and dtype.

Two kinds, for two costs. `PolynomialHash` takes arbitrary keys: tiles, partitions. `RangeHash`
takes consecutive keys, one per weight, at the cost of one XOR each.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from memfold.seeding import derive_seed
from memfold.strategies.sharing.signs import OuterSigns

__all__ = ["HASH_RANGE", "PolynomialHash", "RangeHash", "xor_tables"]

HASH_RANGE = 2**31
"""Every hash value is in [0, HASH_RANGE)."""
_PRIME = 2**31 - 1
_CHARACTER_BITS = 12

Integers = TypeVar("Integers", int, np.ndarray, Tensor)


class PolynomialHash:
    """A random cubic polynomial modulo the Mersenne prime 2^31 - 1 (Carter and Wegman 1981).

    4-wise independent for keys below the prime; keys up to 2^62 are folded first. Every product
    stays below 2^62: int64 products of three factors, as in some published hashes, wrap around
    and are then no longer universal.
    """

    def __init__(self, *parts: int | str) -> None:
        """Draw the five coefficients from `derive_seed(*parts, i)`."""
        self._coefficients = [
            derive_seed("polynomial-hash", *parts, i) % (_PRIME - 1) + 1 for i in range(5)
        ]

    def __call__(self, keys: Integers) -> Integers:
        """Hash whole numbers: an int, or an int64 array or tensor of any shape."""
        high_coefficient, *polynomial = self._coefficients
        x = _fold((keys & _PRIME) + high_coefficient * (keys >> 31))
        hashed = _fold(polynomial[0] * x + polynomial[1])
        for coefficient in polynomial[2:]:
            hashed = _fold(hashed * x + coefficient)
        return _once(hashed)

    def below(self, bound: int, keys: Integers) -> Integers:
        """Hash into [0, bound), for a bound of at most `HASH_RANGE`."""
        return scale_below(bound, self(keys))

    def signs(self, keys: Integers) -> Integers:
        """Hash into {-1, +1}."""
        return hash_signs(self(keys))


class RangeHash:
    """Simple tabulation of consecutive keys: T0[low 12 bits] XOR T1[the rest].

    3-wise independent for random tables, with Chernoff-like concentration of the loads
    (Patrascu and Thorup 2012); the tables come from polynomial hashes and are made when needed.
    """

    def __init__(self, *parts: int | str) -> None:
        """Derive both tables from `parts`."""
        self._low = PolynomialHash("low", *parts)
        self._high = PolynomialHash("high", *parts)

    def __call__(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Hash the keys start, ..., stop - 1: int64, shape (stop - start,)."""
        return xor_tables(*self.tables(stop, device), start, stop)

    def tables(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hash the parts of the keys 0, ..., count - 1.

        Returns:
            T1 for the high bits, T0 for the low ones: int64, shapes (high,) and (low,).
        """
        size = 1 << _CHARACTER_BITS
        high = torch.from_numpy(self._high(np.arange(-(-count // size))))
        return high.to(device), torch.from_numpy(self._low(np.arange(size))).to(device)

    @staticmethod
    def table_bytes(count: int) -> int:
        """Return the bytes of `tables(count)`."""
        return 8 * ((1 << _CHARACTER_BITS) + -(-count // (1 << _CHARACTER_BITS)))

    def signs(self, start: int, stop: int) -> OuterSigns:
        """Hash the signs of the keys start, ..., stop - 1, without a number for each of them.

        The top bit of an XOR is the XOR of the top bits: a sign is a product of two tables' signs.
        """
        first, last = start >> _CHARACTER_BITS, (stop - 1) >> _CHARACTER_BITS
        size = 1 << _CHARACTER_BITS
        # One row needs no more columns than there are keys.
        width = size if last > first else stop - first * size
        rows, columns = (
            torch.from_numpy(hash_signs(table(keys)).astype(np.int8))
            for table, keys in (
                (self._high, np.arange(first, last + 1)),
                (self._low, np.arange(width)),
            )
        )
        return OuterSigns(rows, columns, start - first * size)


def xor_tables(high: Tensor, low: Tensor, start: int, stop: int) -> Tensor:
    """Return the hashes of the keys start, ..., stop - 1 from `RangeHash.tables`."""
    first, last = start >> _CHARACTER_BITS, (stop - 1) >> _CHARACTER_BITS
    offset = start - (first << _CHARACTER_BITS)
    found = high[first : last + 1, None] ^ low
    return found.flatten()[offset : offset + stop - start]


def scale_below(bound: int, hashed: Integers) -> Integers:
    """Scale hash values to [0, bound) by a multiplication and a shift (Lemire 2019)."""
    return (hashed * bound) >> 31


def hash_signs(hashed: Integers) -> Integers:
    """Turn the top bit of hash values into signs, -1 or +1."""
    return 1 - 2 * (hashed >> 30)


def _once(x: Integers) -> Integers:
    return (x & _PRIME) + (x >> 31)


def _fold(x: Integers) -> Integers:
    """Reduce modulo the prime, from below 2^63 to at most 2^31."""
    return _once(_once(x))
