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
from memfold.strategies.sharing.products import Choice
from memfold.strategies.sharing.random_fold import RandomFold

__all__ = ["StableRPS"]


@dataclass(frozen=True, kw_only=True)
class StableRPS(SharingStrategy, name="stable_rps"):
    """One vector for the whole model, RANDOMFOLD, unit gain per slot, scaled gradients."""

    align_rows: bool = False
    """Let no partition end inside a row of a weight: cheaper products, less even loads."""

    linear: Choice = "auto"
    """How linear layers and convolutions of size 1 multiply. `weight` builds it; `windows` takes
    blocks of its rows as views of phi; `correlation` takes Fourier transforms; `auto` is what costs
    least for the layer, the batch and the device."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of range.
        """
        super().__post_init__()
        if self.linear in ("windows", "correlation") and self.sign == "weight":
            raise InputError(
                f"compression.linear={self.linear} needs compression.sign=column or run: with a "
                "sign per weight no row is a window of the vector"
            )

        if self.linear in ("windows", "correlation") and self.autograd == "whole":
            raise InputError(
                f"compression.linear={self.linear} builds no weight, compression.autograd=whole "
                "all of them; choose one"
            )

    def linear_path(self) -> Choice:
        """See the option."""
        return self.linear

    def mapping(self, spans: Sequence[Span], num_slots: int) -> RandomFold:
        """Make the mapping for `num_slots` values."""
        return RandomFold(
            spans, num_slots, seed=self.seed, sign=self.sign, align_rows=self.align_rows
        )
