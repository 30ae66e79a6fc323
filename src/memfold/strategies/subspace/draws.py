"""Random numbers that are computed where they are used: nothing of them is kept or stored.

A stream permutes the whole numbers below 2^b: an offset modulo 2^b, and three times x ^= x >> b/2
and an odd factor modulo 2^b, each of which can be undone. Products stay below 2^62, and what
follows from them is a whole number times one factor, so that every device has the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memfold.seeding import derive_seed

__all__ = ["Draws"]

_BITS = 31
_ROUNDS = 3
# Numbers that are drawn at a time: they stay in a processor's cache.
_CHUNK_NUMEL = 1 << 15
_FIELD = (1 << 10) - 1
# The sum of three fields, doubled and around 0, has the variance 2^20 - 1.
_FIELDS = 3
_SPREAD = ((1 << 20) - 1) ** 0.5


class Draws:
    """A stream of random numbers, which its name and the seed alone decide."""

    def __init__(self, *parts: int | str) -> None:
        """Derive its constants from `derive_seed(*parts, i)`."""
        numbers = [derive_seed("draws", *parts, i) % (1 << _BITS) for i in range(_ROUNDS + 1)]
        self._offset, *factors = numbers
        self._factors = [factor | 1 for factor in factors]

    def integers(
        self, begin: int, end: int, device: torch.device | str, bits: int = _BITS
    ) -> Tensor:
        """Draw numbers begin, ..., end - 1 of the stream: int64, in [0, 2**bits), all different.

        Args:
            begin: At least 0.
            end: At most 2**bits.
            device: Of the result.
            bits: At most 31.
        """
        mask, half = (1 << bits) - 1, (bits + 1) // 2
        x = torch.arange(begin, end, device=device).add_(self._offset & mask).bitwise_and_(mask)
        for factor in self._factors:
            x.bitwise_xor_(x >> half).mul_(factor & mask).bitwise_and_(mask)
        return x.bitwise_xor_(x >> half)

    def permutation(self, bits: int, device: torch.device) -> Tensor:
        """Permute the numbers below 2**bits: int32, shape (2**bits,)."""
        like = torch.empty(0, dtype=torch.int32, device=device)
        return _filled(1 << bits, like, lambda a, b: self.integers(a, b, device, bits))

    def uniform(self, count: int, spread: float, like: Tensor) -> Tensor:
        """Draw from a uniform distribution around 0 with the standard deviation `spread`.

        Returns:
            Shape (count,), in the dtype and on the device of `like`, float32 or wider.
        """

        def draw(begin: int, end: int) -> Tensor:
            return self.integers(begin, end, like.device).mul_(2).sub_((1 << _BITS) - 1)

        return _filled(count, like, draw).mul_(spread * 3**0.5 / (1 << _BITS))

    def normal(self, count: int, spread: float, like: Tensor) -> Tensor:
        """Draw from a nearly normal distribution, the sum of three uniform ones.

        Returns:
            Like that of `uniform`.
        """
        numbers = _filled(count, like, lambda a, b: self._normal(a, b, like.device))
        return numbers.mul_(spread / _SPREAD)

    def mean_square(self, count: int) -> float:
        """Return the exact mean square of `normal(count, 1, ...)`."""
        parts = (self._normal(*ends, "cpu") for ends in _parts(count))
        return sum(int(part.square_().sum()) for part in parts) / count / _SPREAD**2

    def signs(self, count: int, like: Tensor) -> Tensor:
        """Draw -1 and +1.

        Returns:
            Like that of `uniform`.
        """

        def draw(begin: int, end: int) -> Tensor:
            return (self.integers(begin, end, like.device) >> (_BITS - 1)).mul_(2).sub_(1)

        return _filled(count, like, draw)

    def _normal(self, begin: int, end: int, device: torch.device | str) -> Tensor:
        x = self.integers(begin, end, device)
        fields = (x & _FIELD).add_(x >> 10 & _FIELD).add_(x >> 20 & _FIELD)
        return fields.mul_(2).sub_(_FIELDS * _FIELD)


def _parts(count: int) -> list[tuple[int, int]]:
    starts = range(0, count, _CHUNK_NUMEL)
    return [(begin, min(begin + _CHUNK_NUMEL, count)) for begin in starts]


def _filled(count: int, like: Tensor, draw: Callable[[int, int], Tensor]) -> Tensor:
    out = torch.empty(count, dtype=like.dtype, device=like.device)
    for begin, end in _parts(count):
        out[begin:end] = draw(begin, end)
    return out
