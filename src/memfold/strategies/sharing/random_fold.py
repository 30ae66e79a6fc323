"""RANDOMFOLD: consecutive weights lie in consecutive slots of one circular vector."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.fold import Block, add_block, read_block, scale_segments
from memfold.strategies.sharing.fold_triton import add_blocks, read_blocks, uses_triton
from memfold.strategies.sharing.hashing import PolynomialHash
from memfold.strategies.sharing.mapping import Hashes, Sign, SlotMapping, Span
from memfold.strategies.sharing.products import RowLayout, Windows
from memfold.strategies.sharing.whole_fold import WholeFold
from memfold.strategies.sharing.whole_model import WholeModel

__all__ = ["RandomFold"]

# Segments shorter than this, on average, are not worth telling apart from slots.
_SHORTEST = 8
# Weights, or one window of them, that are copied at a time to be multiplied by their signs.
_COPIED_NUMEL = 1 << 20


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


class _Hashes(Hashes):
    """The windows of all tensors, and where the segments of slots begin."""

    def __init__(self, blocks: dict[str, list[Block]], num_slots: int) -> None:
        self.blocks = blocks
        self._num_slots = num_slots
        # The edges are few beside the windows, or as many as slots.
        every = (block for found in blocks.values() for block in found)
        self.nbytes = sum(block.starts.nbytes + block.signs.nbytes for block in every)

    @cached_property
    def edges(self) -> np.ndarray:
        """First slot of every segment, ascending from 0: int64. All slots if segments are short."""
        m, found = self._num_slots, [np.zeros(1, dtype=np.int64)]
        for block in (block for blocks in self.blocks.values() for block in blocks):
            if block.length < m:
                found += [block.starts, (block.starts + block.length) % m]
        edges = np.unique(np.concatenate(found))
        return edges if len(edges) * _SHORTEST <= m else np.arange(m)


class RandomFold(SlotMapping):
    """The mapping h(i) = (r_k + i mod m) mod m.

    Partition k holds the weights km, ..., km + m - 1 of the model, rotated by a random r_k; what
    one tensor holds of one partition is a window. With `align_rows`, a partition ends early where
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
        self._window_sign = PolynomialHash(seed, "run-sign")
        self._units = {span.name: self._unit(span, align_rows) for span in self.spans}
        self._places: dict[str, _Place] = {}
        place = _Place(0, 0)
        for span in dict.fromkeys(self.spans):
            self._places[span.name] = place
            for pieces in self._pieces(span):
                place = _Place(pieces.partitions[-1], pieces.begin + pieces.length)

    @property
    def is_bijection(self) -> bool:
        """Whether m = n: then the map is a rotation with signs."""
        return self.num_slots == self.num_weights

    @property
    def unevenness(self) -> float:
        """Standard deviation over mean of the slots' loads."""
        loads, lengths = self.accumulate([1.0] * len(self.spans)), self._lengths
        mean = self.num_weights / self.num_slots
        return float(((loads - mean).square() * lengths).sum() / self.num_slots) ** 0.5 / mean

    def layout(self, span: Span) -> RowLayout | None:
        """See `SlotMapping.layout`; none with a sign per weight."""
        if self.sign == "weight":
            return None
        return RowLayout.of(self.windows(span), columns=span.columns, num_slots=self.num_slots)

    def windows(self, span: Span) -> Windows:
        """List the windows of one tensor; signs other than those of the windows are left out.

        Args:
            span: One of `spans`.
        """
        blocks = self._blocks(span)
        return Windows(
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
        if uses_triton(slots, out):
            signs = self.signs(span, slots.device)
            read_blocks(slots, self._blocks(span), factor, out, signs)
            return out
        for block in self._blocks(span):
            read_block(slots, block, factor, out)
        signs = self.signs(span, slots.device)
        if signs is not None:
            signs.multiply_(out)
        return out

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        if uses_triton(out, weights):
            add_blocks(weights, self._blocks(span), factor, out, self.signs(span, out.device))
            return
        signs = self.signs(span, out.device)
        for block in self._blocks(span):
            if signs is None:
                add_block(weights, block, factor, out)
                continue
            for part in block.split(_COPIED_NUMEL):
                copied = weights[part.offset : part.stop].to(out.dtype, copy=True)
                signs.multiply_(copied, part.offset)
                add_block(copied, replace(part, offset=0), factor, out)

    def whole(
        self,
        factors: Sequence[float],
        zero_rows: Sequence[int | None],
        slot_factors: tuple[Tensor, Tensor],
    ) -> WholeModel:
        """See `SlotMapping.whole`; all at once where partitions are consecutive weights."""
        is_cut = any(unit > 1 for unit in self._units.values())
        if self.sign == "run" or is_cut or self.has_copies:
            return super().whole(factors, zero_rows, slot_factors)
        device, partitions = slot_factors[0].device, -(-self.num_weights // self.num_slots)
        return WholeFold(
            self,
            factors,
            zero_rows,
            slot_factors,
            rotations=torch.from_numpy(
                self._rotation.below(self.num_slots, np.arange(partitions))
            ).to(device, torch.int32),
            segments=self._lengths.int(),
            signs=[self.hash_signs(span).to(device) for span in self.spans],
        )

    def accumulate(self, constants: Sequence[float]) -> Tensor:
        """See `SlotMapping.accumulate`; a segment ends where any tensor's window does."""
        edges = self._edges
        sums = np.zeros(len(edges))
        for span, constant in zip(self.spans, constants, strict=True):
            sums += constant * self._count_windows(span, edges)
        return torch.from_numpy(sums)

    def scale(self, slots: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """See `SlotMapping.scale`."""
        return scale_segments(slots, factors, self._lengths, out)

    @property
    def _edges(self) -> np.ndarray:
        return self._windows_hashed.edges

    @property
    def _windows_hashed(self) -> _Hashes:
        hashes = self.hashes()
        assert isinstance(hashes, _Hashes)
        return hashes

    @property
    def _lengths(self) -> Tensor:
        """Slots of each segment: int64, shape (segments,)."""
        return torch.from_numpy(np.diff(self._edges, append=self.num_slots))

    def _count_windows(self, span: Span, edges: np.ndarray) -> np.ndarray:
        """Count the weights of a span in a slot of each segment: int64, shape (segments,)."""
        m, counts = self.num_slots, np.zeros(len(edges), dtype=np.int64)
        for block in self._blocks(span):
            if block.length == m:
                counts += len(block.starts)
                continue
            ends = block.starts + block.length
            begun = np.bincount(np.searchsorted(edges, block.starts), minlength=len(edges))
            ended = np.bincount(np.searchsorted(edges, ends % m), minlength=len(edges))
            # A window that wraps, or ends at m, is open at slot 0.
            counts += np.cumsum(begun - ended) + int((ends >= m).sum())
        return counts

    def _compute_hashes(self) -> _Hashes:
        blocks = {
            span.name: [self._block(span, pieces) for pieces in self._pieces(span)]
            for span in self.spans
        }
        return _Hashes(blocks, self.num_slots)

    def _unit(self, span: Span, align_rows: bool) -> int:
        """Return what a partition holds whole multiples of."""
        return span.columns if align_rows and span.columns <= self.num_slots else 1

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
        return self._windows_hashed.blocks[span.name]

    def _block(self, span: Span, pieces: _Pieces) -> Block:
        """Hash the rotation r_k of each partition, and each window's sign by its first weight."""
        m = self.num_slots
        partitions = np.arange(pieces.partitions.start, pieces.partitions.stop)
        starts = (self._rotation.below(m, partitions) + pieces.begin) % m
        signs = np.ones_like(partitions)
        if self.sign == "run":
            first = span.start + pieces.offset
            signs = self._window_sign.signs(first + np.arange(len(partitions)) * pieces.length)
        return Block(pieces.offset, pieces.length, starts, signs)
