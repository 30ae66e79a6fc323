"""STABLE-RPS: the whole model folded into one vector by RANDOMFOLD.

Desai and Shrivastava, "In defense of parameter sharing for model-compression" (ICLR 2024,
arXiv 2310.11611). The n flattened weights are cut into partitions of m; partition k is rotated by
a random r_k: weight i sits in slot h(i) = (r_k + i mod m) mod m with k = i // m. Every slot holds
floor(n/m) or ceil(n/m) weights, and at m = n nothing is shared. What shrinks: parameters,
gradients, optimizer state, checkpoints, DDP traffic. What does not: activations. Where sharing is
strong, operations do: a matrix product can be taken with the vector's windows, or by Fourier
transforms, instead of with the matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memfold.errors import InputError
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.random_fold import RandomFold

__all__ = ["StableRPS"]


@dataclass(frozen=True, kw_only=True)
class StableRPS(SharingStrategy, name="stable_rps"):
    """One vector for the whole model, RANDOMFOLD, unit gain per slot, scaled gradients."""

    align_rows: bool = False
    """Let no partition end inside a row of a weight: cheaper products, less even loads."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of range.
        """
        super().__post_init__()
        if not isinstance(self.align_rows, bool):
            raise InputError(f"compression.align_rows must be true or false, got {self.align_rows}")

    def mapping(self, spans: Sequence[Span], num_slots: int) -> RandomFold:
        """Make the mapping for `num_slots` values."""
        return RandomFold(
            spans, num_slots, seed=self.seed, sign=self.sign, align_rows=self.align_rows
        )
