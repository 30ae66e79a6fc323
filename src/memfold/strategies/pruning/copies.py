"""Copies of a model whose weights move: what is written into one that stayed behind is noticed.

A copy made by `copy.deepcopy` keeps the positions of that moment. Averages of weights, target
networks and the like write entry i of the trained model's values over entry i of the copy's, which
is another weight once the trained model has moved. Nothing in PyTorch tells, so a copy that is left
behind remembers what its values were.
"""

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memfold.strategies.pruning.sparse_weights import SparseWeights

__all__ = ["Content", "Copies", "content_of"]


class Copies:
    """Compressions that were copied from each other and are alive; all of them hold this object."""

    def __init__(self) -> None:
        self.members: WeakSet[SparseWeights] = WeakSet()
        self.left_behind: WeakSet[SparseWeights] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> "Copies":
        """Stay the same object."""
        return self

    def __reduce__(self) -> tuple[type["Copies"], tuple[()]]:
        """Know nobody in another process."""
        return Copies, ()


class Content(NamedTuple):
    """What tells whether numbers have been changed."""

    dtype: torch.dtype
    checksum: int


def content_of(values: Tensor) -> Content:
    """Sum up the bits of floating-point values of shape (n,): the same on every device."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return Content(values.dtype, int(values.detach().view(integers).sum(dtype=torch.int64)))
