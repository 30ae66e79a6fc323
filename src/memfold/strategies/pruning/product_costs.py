"""Whether a product with the kept values alone costs less than one with the weight that they make.

An estimate from constants, without clocks: every rank, run and resumption decides alike.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Linear", "Product"]

Linear = Literal["auto", "weight", "kept"]
"""How layers multiply with a sparse weight: "weight" builds it, "kept" does without, "auto" takes
what `Product` says is cheaper."""

# Weights in smaller matrices are built, whatever it costs: microseconds.
_SMALLEST = 1 << 17

# Seconds on one core of a server in float32, fitted to what scripts/measure_kept_products.py shows.
_CALLS = 1.0e-4
"""The calls around one product."""
_READ = 2.1e-10
_READ_CACHED = 1.0e-10
_MULTIPLY_ADD = 2.7e-11
"""One number of a dense matrix: read, from a cache if it fits, and multiplied with one sample's."""
_EXTRA_BATCH = 24
"""A dense product of few samples takes as long as one with so many more."""
_NEW = 1.0e-9
_NEW_LARGE = 2.5e-9
"""One number of a new dense tensor: the system supplies its memory always if it is large, else now
and then."""
_LARGE_BYTES = 1 << 25
_PLACE = 5.5e-9
"""A kept value that is put into a dense tensor, or read from there."""
_VALUE = 1.2e-9
_COLUMN = 3.5e-9
"""A kept value in a sum, whatever the batch; and the column that it lies in, found."""
_TRANSPOSE = 2.5e-8
_MOST_CACHED = 3.0e6
"""A kept value, sorted by its column; twice as much where there are so many of them."""
_SUM = 1.3e-10
_DOT = 2.3e-10
"""A kept value times one number of a sample: in a sum, and in the gradient of the value."""
_TURN = 2.6e-9
"""One number of an input or an output, transposed."""
_SAMPLES = 8
_CACHE_BYTES = 1 << 23
_UNCACHED = 2.0
"""Sums and gradients take so many times as long where inputs and outputs fit in no cache."""


@dataclass(frozen=True)
class Product:
    """One product of a batch with a sparse weight."""

    rows: int
    columns: int
    kept: int
    """Number of values."""
    batch: int
    """Rows of the input."""
    trains: bool
    """Whether a backward pass follows."""
    lasts: bool
    """Whether what is computed from the parts serves many batches, so that it is free."""

    def is_cheaper_kept(self) -> bool:
        """Whether the kept values alone take less time than building the weight."""
        return self.rows * self.columns >= _SMALLEST and self.kept_seconds() < self.built_seconds()

    def built_seconds(self) -> float:
        """Estimate the time with the dense weight."""
        numel = self.rows * self.columns
        samples = self.batch + _EXTRA_BATCH if self.batch > 1 else self.batch
        read = _READ_CACHED if 4 * numel <= _CACHE_BYTES else _READ
        product = _CALLS + numel * (read + samples * _MULTIPLY_ADD)
        if self.lasts:
            return product
        new = _NEW_LARGE if 4 * numel >= _LARGE_BYTES else _NEW
        build = numel * new + self.kept * _PLACE
        # The gradient of the weight is as large, and read at the kept places.
        return 3 * product + 2 * build if self.trains else product + build

    def kept_seconds(self) -> float:
        """Estimate the time with the kept values alone."""
        samples = -(-self.batch // _SAMPLES) * _SAMPLES
        numel = samples * (self.rows + self.columns)
        slow = samples * (_UNCACHED if 2 * numel > _CACHE_BYTES else 1.0)
        turn = numel * _TURN
        product = 2 * _CALLS + turn + self.kept * (_VALUE + slow * _SUM)
        if self.lasts:
            return product
        column = 2 * _CALLS + self.kept * _COLUMN
        if not self.trains:
            return product + column
        transpose = 4 * _CALLS + self.kept * _TRANSPOSE * (1 + self.kept / _MOST_CACHED)
        gradient = 4 * _CALLS + turn + self.kept * slow * _DOT
        return 2 * (product + column) + transpose + gradient
