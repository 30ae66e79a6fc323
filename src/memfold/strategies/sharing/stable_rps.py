"""STABLE-RPS: the whole model folded into one vector by RANDOMFOLD.

Desai and Shrivastava, "In defense of parameter sharing for model-compression" (ICLR 2024,
arXiv 2310.11611). The n flattened weights are cut into partitions of m; partition k is rotated by
a random r_k: weight i sits in slot h(i) = (r_k + i mod m) mod m with k = i // m. Every slot holds
floor(n/m) or ceil(n/m) weights, and at m = n nothing is shared. What shrinks: parameters,
gradients, optimizer state, checkpoints, DDP traffic. What does not: activations, operations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.hashing import PolynomialHash
from memfold.strategies.sharing.mapping import Sign, SlotMapping, Span

__all__ = ["RandomFold", "StableRPS"]

# From this many slots on, a loop of slice-additions beats a gather over many partitions.
_LOOP_SLOTS = 1024
# Bounds the index that such a gather needs: int64 elements at a time.
_GATHER_NUMEL = 1 << 16


@dataclass(frozen=True)
class _Piece:
    """Consecutive whole partitions, or a part of one, inside a span."""

    start: int
    stop: int
    """Place in the span."""
    runs: slice
    """Which of the span's runs it holds."""
    begin: int
    """First position inside its partitions."""


class RandomFold(SlotMapping):
    """The mapping h(i) = (r_k + i mod m) mod m, with one sign per run or per weight.

    A run is what one tensor holds of one partition: a window of the circular vector of slots.
    """

    def __init__(self, spans: Sequence[Span], num_slots: int, *, seed: int, sign: Sign) -> None:
        super().__init__(spans, num_slots, seed=seed, sign=sign)
        self._rotation = PolynomialHash(seed, "rotation")
        self._run_sign = PolynomialHash(seed, "run-sign")

    @property
    def is_bijection(self) -> bool:
        """Whether m = n: then the map is a rotation with signs."""
        return self.num_slots == self.num_weights

    def gather(self, slots: Tensor, span: Span, factor: float) -> Tensor:
        """See `SlotMapping.gather`; copies of at most two slices a run."""
        m = self.num_slots
        out = slots.new_empty(span.numel)
        rotations, signs = self._rotations(span), self._run_signs(span)
        for piece in self._pieces(span):
            target = out[piece.start : piece.stop]
            windows = (rotations[piece.runs] + piece.begin) % m
            factors = signs[piece.runs] * factor
            if len(windows) == 1:
                for a, b, at in _circular(int(windows[0]), target.numel(), m):
                    torch.mul(slots[a:b], float(factors[0]), out=target[at : at + b - a])
            else:
                doubled = torch.cat((slots, slots)).unfold(0, m, 1)
                index = torch.from_numpy(windows).to(slots.device)
                rows = torch.index_select(doubled, 0, index, out=target.view(-1, m))
                rows.mul_(_column(factors, slots))
        if self.sign == "weight":
            out.mul_(self.weight_signs(span.start, span.stop, slots))
        return out

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        m = self.num_slots
        if self.sign == "weight":
            weights = weights * self.weight_signs(span.start, span.stop, weights)
        rotations, signs = self._rotations(span), self._run_signs(span)
        for piece in self._pieces(span):
            source = weights[piece.start : piece.stop]
            windows = (rotations[piece.runs] + piece.begin) % m
            factors = signs[piece.runs] * factor
            if len(windows) > 1 and m < _LOOP_SLOTS:
                _add_rotated(source.view(-1, m), windows, factors, out)
                continue
            for row, window, scale in zip(source.split(m), windows, factors, strict=True):
                for a, b, at in _circular(int(window), row.numel(), m):
                    out[a:b].add_(row[at : at + b - a], alpha=float(scale))

    def accumulate(
        self, constants: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """See `SlotMapping.accumulate`; whole partitions add the same to every slot."""
        m = self.num_slots
        sums = torch.zeros(m, dtype=dtype, device=device)
        everywhere = 0.0
        for span, constant in zip(self.spans, constants, strict=True):
            rotations = self._rotations(span)
            for piece in self._pieces(span):
                size = piece.stop - piece.start
                if size % m == 0:
                    everywhere += constant * (size // m)
                    continue
                window = (int(rotations[piece.runs][0]) + piece.begin) % m
                for a, b, _ in _circular(window, size, m):
                    sums[a:b] += constant
        return sums.add_(everywhere)

    def _pieces(self, span: Span) -> Iterator[_Piece]:
        """Cut a span at partition ends; whole partitions stay together."""
        m = self.num_slots
        position, run = span.start, 0
        while position < span.stop:
            begin = position % m
            whole = (span.stop - position) // m if begin == 0 else 0
            stop = position + whole * m if whole else min(span.stop, position - begin + m)
            runs = slice(run, run + max(1, whole))
            yield _Piece(position - span.start, stop - span.start, runs, begin)
            position, run = stop, runs.stop

    def _partitions(self, span: Span) -> np.ndarray:
        return np.arange(span.start // self.num_slots, (span.stop - 1) // self.num_slots + 1)

    def _rotations(self, span: Span) -> np.ndarray:
        """Rotation r_k of each partition that the span meets: int64, shape (runs,)."""
        return self._rotation.below(self.num_slots, self._partitions(span))

    def _run_signs(self, span: Span) -> np.ndarray:
        """Sign of each run of the span, hashed from its first weight; 1 with signs per weight."""
        partitions = self._partitions(span)
        if self.sign == "weight":
            return np.ones_like(partitions)
        return self._run_sign.signs(np.maximum(partitions * self.num_slots, span.start))


@dataclass(frozen=True, kw_only=True)
class StableRPS(SharingStrategy, name="stable_rps"):
    """One vector for the whole model, RANDOMFOLD, unit gain per slot, scaled gradients."""

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
