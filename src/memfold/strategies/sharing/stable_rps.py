"""STABLE-RPS: the whole model folded into one vector by RANDOMFOLD.

Desai and Shrivastava, "In defense of parameter sharing for model-compression" (ICLR 2024,
arXiv 2310.11611). The n flattened weights are cut into partitions of m; partition k is rotated by
a random r_k: weight i sits in slot h(i) = (r_k + i mod m) mod m with k = i // m. Every slot holds
floor(n/m) or ceil(n/m) weights, and at m = n nothing is shared. What shrinks: parameters,
gradients, optimizer state, checkpoints, DDP traffic. What does not: activations, operations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.hashing import PolynomialHash, RangeHash, hash_signs
from memfold.strategies.sharing.mapping import SlotMapping, Span

__all__ = ["RandomFold", "StableRPS"]

Sign = Literal["run", "weight"]

# From this many slots on, a loop of slice-additions beats a gather over many partitions.
_LOOP_SLOTS = 1024
# Bounds the index that such a gather needs: int64 elements at a time.
_GATHER_NUMEL = 1 << 16


@dataclass(frozen=True)
class _Piece:
    """Positions [begin, end) inside each of the partitions first, ..., last of one span."""

    first: int
    last: int
    begin: int
    end: int


class RandomFold(SlotMapping):
    """The mapping h(i) = (r_k + i mod m) mod m, with one sign per run or per weight.

    A run is what one tensor holds of one partition: a window of the circular vector of slots.
    """

    def __init__(self, spans: Sequence[Span], num_slots: int, *, seed: int, sign: Sign) -> None:
        super().__init__(spans, num_slots)
        self._rotation = PolynomialHash(seed, "rotation")
        self._run_sign = PolynomialHash(seed, "run-sign")
        self._weight_sign = RangeHash(seed, "weight-sign") if sign == "weight" else None

    @property
    def is_bijection(self) -> bool:
        """Whether m = n: then the map is a rotation with signs."""
        return self.num_slots == self.num_weights

    def gather(self, slots: Tensor, span: Span, factor: float) -> Tensor:
        """See `SlotMapping.gather`; copies of at most two slices a run."""
        out = slots.new_empty(span.numel)
        for piece, start, stop in self._pieces(span):
            target = out[start:stop]
            starts, signs = self._windows(piece, span)
            if piece.first == piece.last:
                length = stop - start
                for a, b, at in _circular(int(starts[0]), length, self.num_slots):
                    torch.mul(slots[a:b], int(signs[0]) * factor, out=target[at : at + b - a])
            else:
                windows = torch.cat((slots, slots)).unfold(0, self.num_slots, 1)
                rows = target.view(-1, self.num_slots)
                torch.index_select(windows, 0, torch.from_numpy(starts).to(slots.device), out=rows)
                rows.mul_(_column(signs * factor, slots))
        return out if self._weight_sign is None else out.mul_(self._signs(span, slots))

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        if self._weight_sign is not None:
            weights = weights * self._signs(span, weights)
        m = self.num_slots
        for piece, start, stop in self._pieces(span):
            source = weights[start:stop]
            starts, signs = self._windows(piece, span)
            if piece.first == piece.last or m >= _LOOP_SLOTS:
                for row, window, sign in zip(
                    source.split(min(m, stop - start)), starts, signs, strict=True
                ):
                    for a, b, at in _circular(int(window), row.numel(), m):
                        out[a:b].add_(row[at : at + b - a], alpha=int(sign) * factor)
            else:
                _add_rotated(source.view(-1, m), starts, signs * factor, out)

    def accumulate(self, constants: Sequence[float], device: torch.device) -> Tensor:
        """See `SlotMapping.accumulate`; whole partitions add the same to every slot."""
        m = self.num_slots
        sums = torch.zeros(m, dtype=torch.float64, device=device)
        everywhere = 0.0
        for span, constant in zip(self.spans, constants, strict=True):
            for piece, start, stop in self._pieces(span):
                if piece.end - piece.begin == m:
                    everywhere += constant * (piece.last - piece.first + 1)
                    continue
                window = int(self._windows(piece, span)[0][0])
                for a, b, _ in _circular(window, stop - start, m):
                    sums[a:b] += constant
        return sums.add_(everywhere)

    def _pieces(self, span: Span) -> Iterator[tuple[_Piece, int, int]]:
        """Cut a span at partition ends: the pieces and their place [start, stop) in the span."""
        m = self.num_slots
        position = span.start
        while position < span.stop:
            partition, begin = divmod(position, m)
            if begin == 0 and span.stop - position >= m:
                count = (span.stop - position) // m
                piece, stop = _Piece(partition, partition + count - 1, 0, m), position + count * m
            else:
                stop = min(span.stop, (partition + 1) * m)
                piece = _Piece(partition, partition, begin, begin + stop - position)
            yield piece, position - span.start, stop - span.start
            position = stop

    def _windows(self, piece: _Piece, span: Span) -> tuple[np.ndarray, np.ndarray]:
        """First slot and sign of each run of a piece: two int64 arrays of shape (runs,)."""
        partitions = np.arange(piece.first, piece.last + 1)
        starts = (self._rotation.below(self.num_slots, partitions) + piece.begin) % self.num_slots
        if self._weight_sign is not None:
            return starts, np.ones_like(starts)
        keys = np.maximum(partitions * self.num_slots, span.start)
        return starts, self._run_sign.signs(keys)

    def _signs(self, span: Span, like: Tensor) -> Tensor:
        assert self._weight_sign is not None
        hashed = self._weight_sign(span.start, span.stop, like.device)
        return hash_signs(hashed).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class StableRPS(SharingStrategy, name="stable_rps"):
    """One vector for the whole model, RANDOMFOLD, unit gain per slot, scaled gradients."""

    sign: Sign = "run"
    """One random sign per contiguous run (`run`) or per weight (`weight`, the paper's)."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of range.
        """
        super().__post_init__()
        if self.sign not in ("run", "weight"):
            raise InputError(f"compression.sign must be run or weight, got {self.sign!r}")

    def mapping(self, spans: Sequence[Span], num_slots: int) -> RandomFold:
        """Make the mapping for `num_slots` values."""
        return RandomFold(spans, num_slots, seed=self.seed, sign=self.sign)


def _circular(start: int, length: int, m: int) -> Iterator[tuple[int, int, int]]:
    """Cut a window of a circular vector: slices [a, b) and where each begins in the window."""
    first = min(length, m - start)
    yield start, start + first, 0
    if length > first:
        yield 0, length - first, first


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)[:, None]


def _add_rotated(rows: Tensor, starts: np.ndarray, factors: np.ndarray, out: Tensor) -> None:
    """Rotate each row right by its start, scale, and add all of them to `out`."""
    m = out.numel()
    slots = torch.arange(m, device=out.device)
    step = max(1, _GATHER_NUMEL // m)
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        shift = torch.from_numpy(starts[part]).to(out.device)[:, None]
        positions = slots - shift
        positions += (positions < 0) * m
        scaled = torch.gather(rows[part], 1, positions).mul_(_column(factors[part], out))
        out.add_(scaled.sum(0))
