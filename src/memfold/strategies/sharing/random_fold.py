"""RANDOMFOLD: consecutive weights lie in consecutive slots of one circular vector."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.fold import Block, add_block, read_block
from memfold.strategies.sharing.hashing import PolynomialHash
from memfold.strategies.sharing.mapping import Sign, SlotMapping, Span
from memfold.strategies.sharing.runs import Runs

__all__ = ["RandomFold"]

# Up to this many windows are counted slice by slice, more of them by a running sum.
_COUNTED_RUNS = 16


@dataclass(frozen=True)
class _Place:
    """Where a span begins: `used` weights of partition number `partition` come before it."""

    partition: int
    used: int


@dataclass(frozen=True)
class _Pieces:
    """Equal parts of consecutive partitions, inside one span."""

    offset: int
    """Place in the span."""
    length: int
    """Weights of each part."""
    partitions: range
    begin: int
    """First position of each part inside its partition."""


class RandomFold(SlotMapping):
    """The mapping h(i) = (r_k + i mod m) mod m, with one sign per run or per weight.

    Partition k holds the weights km, ..., km + m - 1 of the model, rotated by a random r_k; what
    one tensor holds of one partition is a run. With `align_rows`, a partition ends early where
    the next row of a tensor does not fit into it as a whole, and the next partition starts there:
    no row is cut, loads differ by more than one in places. Rows longer than m are cut all the
    same. A row is what the first dimension of a tensor counts.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        num_slots: int,
        *,
        seed: int,
        sign: Sign,
        align_rows: bool = False,
    ) -> None:
        super().__init__(spans, num_slots, seed=seed, sign=sign)
        self._rotation = PolynomialHash(seed, "rotation")
        self._run_sign = PolynomialHash(seed, "run-sign")
        self._units = {span.name: self._unit(span, align_rows) for span in self.spans}
        self._places: dict[str, _Place] = {}
        place = _Place(0, 0)
        for span in self.spans:
            self._places[span.name] = place
            for pieces in self._pieces(span):
                place = _Place(pieces.partitions[-1], pieces.begin + pieces.length)

    @property
    def is_bijection(self) -> bool:
        """Whether m = n: then the map is a rotation with signs."""
        return self.num_slots == self.num_weights

    def runs(self, span: Span) -> Runs:
        """List the windows of one tensor, with signs per run.

        Args:
            span: One of `spans`.
        """
        blocks = self._blocks(span)
        return Runs(
            offsets=np.concatenate(
                [np.arange(b.offset, b.stop, b.length, dtype=np.int64) for b in blocks]
            ),
            lengths=np.concatenate([np.full_like(b.starts, b.length) for b in blocks]),
            starts=np.concatenate([b.starts for b in blocks]),
            signs=np.concatenate([b.signs for b in blocks]),
        )

    def gather(
        self, slots: Tensor, span: Span, factor: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """See `SlotMapping.gather`; one pass over the result."""
        out = slots.new_empty(span.numel, dtype=dtype)
        for block in self._blocks(span):
            read_block(slots, block, factor, out)
        if self.sign == "weight":
            self.multiply_signs(out, span)
        return out

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        if self.sign == "weight":
            weights = weights.clone()
            self.multiply_signs(weights, span)
        for block in self._blocks(span):
            add_block(weights, block, factor, out)

    def accumulate(
        self, constants: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """See `SlotMapping.accumulate`; whole partitions add the same to every slot."""
        m = self.num_slots
        sums = torch.zeros(m, dtype=dtype, device=device)
        everywhere = 0.0
        for span, constant in zip(self.spans, constants, strict=True):
            for block in self._blocks(span):
                if block.length == m:
                    everywhere += constant * len(block.starts)
                elif len(block.starts) <= _COUNTED_RUNS:
                    for start in block.starts.tolist():
                        sums[start : start + block.length] += constant
                        if start + block.length > m:
                            sums[: start + block.length - m] += constant
                else:
                    loads = torch.from_numpy(_count_windows(block, m)).to(device, dtype)
                    sums.add_(loads, alpha=constant)
        return sums.add_(everywhere)

    def _unit(self, span: Span, align_rows: bool) -> int:
        """Return what a partition holds whole multiples of."""
        row = span.numel // span.shape[0]
        return row if align_rows and row <= self.num_slots else 1

    def _pieces(self, span: Span) -> Iterator[_Pieces]:
        """Cut a span at partition ends; parts of the same length stay together."""
        unit, place = self._units[span.name], self._places[span.name]
        whole = self.num_slots // unit * unit
        partition, used, offset = place.partition, place.used, 0
        room = (self.num_slots - used) // unit * unit
        if room == 0:
            partition, used = partition + 1, 0
        elif used > 0:
            length = min(room, span.numel)
            yield _Pieces(0, length, range(partition, partition + 1), used)
            partition, offset = partition + 1, length
        count, rest = divmod(span.numel - offset, whole)
        if count:
            yield _Pieces(offset, whole, range(partition, partition + count), 0)
            partition, offset = partition + count, offset + count * whole
        if rest:
            yield _Pieces(offset, rest, range(partition, partition + 1), 0)

    def _blocks(self, span: Span) -> list[Block]:
        return [self._block(span, pieces) for pieces in self._pieces(span)]

    def _block(self, span: Span, pieces: _Pieces) -> Block:
        """Hash the rotation r_k of each partition, and the sign of each run by its first weight."""
        m = self.num_slots
        partitions = np.arange(pieces.partitions.start, pieces.partitions.stop)
        starts = (self._rotation.below(m, partitions) + pieces.begin) % m
        if self.sign == "weight":
            signs = np.ones_like(partitions)
        else:
            first = span.start + pieces.offset
            signs = self._run_sign.signs(first + np.arange(len(partitions)) * pieces.length)
        return Block(pieces.offset, pieces.length, starts, signs)


def _count_windows(block: Block, m: int) -> np.ndarray:
    """Count how many of a block's windows hold each slot: int64, shape (m,)."""
    begins = np.bincount(block.starts, minlength=m)
    ends = np.bincount((block.starts + block.length) % m, minlength=m)
    # A window that wraps, or ends at m, is open at slot 0.
    wrapping = int((block.starts + block.length >= m).sum())
    return np.cumsum(begins - ends) + wrapping
