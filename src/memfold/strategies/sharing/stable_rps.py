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
from dataclasses import dataclass, replace

from torch import nn

from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.products import Choice
from memfold.strategies.sharing.random_fold import RandomFold
from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["StableRPS"]

# In float32, as many are built whole, and no row is multiplied where it lies.
_FEW_WEIGHTS = 1 << 20
# Rows that partitions cut are dear where they hold more than one weight in so many.
_DEAR_SHARE = 16
# Loads are as good as even up to here: standard deviation over mean.
_UNEVENNESS = 0.01


@dataclass(frozen=True, kw_only=True)
class StableRPS(SharingStrategy, name="stable_rps"):
    """One vector for the whole model, RANDOMFOLD, unit gain per slot, scaled gradients."""

    align_rows: bool | None = None
    """Let no partition end inside a row of a weight: cheaper products, less even loads. `null` does
    it with more than a million weights where rows that partitions cut would hold more than one
    weight in 16 and loads then differ by at most 1 % (standard deviation over mean); the built
    compression says which."""

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

        if self.linear in ("windows", "correlation") and self.autograd in ("whole", "classic"):
            raise InputError(
                f"compression.linear={self.linear} builds no weight, compression.autograd="
                f"{self.autograd} all of them; choose one"
            )

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> SharedVector:
        """See `Strategy.build`."""
        if self.align_rows is None:
            # What an artifact says of its options is counted in a budget: those that are built.
            unaligned = replace(self, align_rows=False)
            spans = tuple(dict.fromkeys(self.spans(model, weights)))
            aligns = self._aligns(spans, unaligned._num_values(model, weights))
            return replace(self, align_rows=aligns).build(model, weights, context)
        return super().build(model, weights, context)

    def linear_path(self) -> Choice:
        """See the option."""
        return self.linear

    def mapping(self, spans: Sequence[Span], num_slots: int) -> RandomFold:
        """Make the mapping for `num_slots` values."""
        aligned = bool(self.align_rows)
        return RandomFold(spans, num_slots, seed=self.seed, sign=self.sign, align_rows=aligned)

    def _aligns(self, spans: Sequence[Span], num_slots: int) -> bool:
        """Decide for `align_rows=None`, from what decides the mapping, not how it is computed."""
        num_weights = spans[-1].stop
        if num_weights <= _FEW_WEIGHTS or self.sign == "weight":
            return False
        # A partition's end cuts one row; a row longer than a partition is cut all the same.
        cut = sum(span.numel * span.columns for span in spans if span.columns <= num_slots)
        if cut * _DEAR_SHARE <= num_weights * num_slots:
            return False
        return replace(self, align_rows=True).mapping(spans, num_slots).unevenness <= _UNEVENNESS
