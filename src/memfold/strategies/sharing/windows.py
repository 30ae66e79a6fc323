"""A tensor as contiguous windows of the circular vector of slots."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """Where one flattened tensor lies in the vector; int64 arrays of shape (windows,).

    Window i holds the weights offsets[i], ..., offsets[i] + lengths[i] - 1 of the tensor, in the
    slots starts[i], starts[i] + 1, ... modulo m, all with sign signs[i]. Windows follow each other
    without gaps, and none is longer than m.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    """In [0, m)."""
    signs: np.ndarray
    """-1 or +1."""

    def __len__(self) -> int:
        return len(self.offsets)
