"""Which weights stay: exact counts, and of equal scores the first."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from itertools import chain, pairwise
from math import floor
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memfold.strategies.pruning.densities import Distribution, layer_counts

__all__ = [
    "PackedMask",
    "Ranking",
    "Scope",
    "former_shares",
    "keep_counts",
    "keep_largest",
    "schedule_counts",
    "shuffle_mask",
]

Scope = Literal["global", "layer"]
_CHUNK = 1 << 18
"""Scores that are looked at together: their copies fit the caches."""
_DIGIT = 16
"""Bits of a score that one histogram tells apart."""
_INTEGERS = {4: torch.int32, 8: torch.int64}


class PackedMask:
    """A bool tensor, eight entries to a byte; at first all are True."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        """Make a mask of that shape."""
        self._shape = shape
        self._bytes = torch.full((-(-shape.numel() // 8),), 255, dtype=torch.uint8, device=device)
        self._powers = 1 << torch.arange(8, dtype=torch.uint8, device=device)

    def write(self, parts: Iterable[Tensor]) -> None:
        """Take over a mask that comes in chunks."""
        for part, packed in zip(parts, self._bytes.split(_CHUNK // 8), strict=True):
            entries = F.pad(part.byte(), (0, -len(part) % 8)).view(-1, 8)
            torch.sum(entries * self._powers, dim=1, dtype=torch.uint8, out=packed)

    def count(self) -> int:
        """Return how many entries are True."""
        return sum(int(part.sum()) for part in self._parts())

    def unpacked(self) -> Tensor:
        """Return the mask."""
        mask = torch.empty(self._shape, dtype=torch.bool, device=self._bytes.device)
        for out, part in zip(mask.view(-1).split(_CHUNK), self._parts(), strict=True):
            out.copy_(part)
        return mask

    def fill_others(self, tensor: Tensor, value: float) -> None:
        """Write `value` where the mask is False, into a tensor of its shape."""
        if not tensor.is_contiguous():
            tensor.masked_fill_(~self.unpacked(), value)
            return
        for out, part in zip(tensor.view(-1).split(_CHUNK), self._parts(), strict=True):
            out.masked_fill_(~part, value)

    def _parts(self) -> Iterator[Tensor]:
        num_left = self._shape.numel()
        for packed in self._bytes.split(_CHUNK // 8):
            entries = (packed[:, None] & self._powers) != 0
            yield entries.view(-1)[: min(_CHUNK, num_left)]
            num_left -= _CHUNK


class Ranking:
    """The order in which scores stay: the largest first, and of equal ones the first.

    Nothing is sorted or copied: where the order is cut at a count is found in histograms, digit by
    digit, so that some MB are enough beside the scores and the masks.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        *,
        scope: Scope = "global",
        densities: Distribution | None = None,
    ) -> None:
        """Take the scores; they must stay as they are.

        Args:
            scores: One tensor per weight, on one device; infinite is allowed, NaN is not.
            scope: Whether all scores compete (`global`), or each tensor keeps the same share
                (`layer`).
            densities: Shares that the tensors keep, whatever the scope is (`layer_counts`).
        """
        self._scores = [score.detach() for score in scores]
        self._is_global = scope == "global" and densities is None
        self._densities: Distribution | None = densities

    def counts(self, count: int) -> list[int]:
        """Return how many of each tensor stay when `count` do in all."""
        if self._is_global:
            return [mask.count() for mask in self.masks(count)]
        if self._densities is not None:
            return layer_counts([score.shape for score in self._scores], count, self._densities)
        return _equal_shares([score.numel() for score in self._scores], count)

    def masks(self, count: int) -> list[PackedMask]:
        """Return masks of the scores' shapes: True at the `count` that stay."""
        assert 0 <= count <= sum(score.numel() for score in self._scores)
        if self._is_global:
            return _largest(self._scores, count)
        pairs = zip(self._scores, self.counts(count), strict=True)
        return [mask for score, kept in pairs for mask in _largest([score], kept)]


def keep_largest(
    scores: Sequence[Tensor],
    count: int,
    *,
    scope: Scope = "global",
    densities: Distribution | None = None,
) -> list[Tensor]:
    """Keep exactly the `count` largest scores; of equal ones the first, in the order given.

    Args:
        scores: One tensor per weight, on one device, without NaN.
        count: How many stay, in all tensors together.
        scope: `global`: all scores compete. `layer`: each tensor keeps the same share of its
            scores, as nearly as whole numbers allow.
        densities: Shares that the tensors keep, whatever the scope is (`layer_counts`).

    Returns:
        Bool tensors of the scores' shapes, on their device.
    """
    ranking = Ranking(scores, scope=scope, densities=densities)
    return [mask.unpacked() for mask in ranking.masks(count)]


def keep_counts(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Keep exactly the `counts[l]` largest scores of tensor l; of equal ones the first.

    Returns:
        Bool tensors of the scores' shapes, on their devices.
    """
    pairs = zip(scores, counts, strict=True)
    return [mask.unpacked() for s, count in pairs for mask in _largest([s.detach()], count)]


def shuffle_mask(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Permute a mask at random; the number of kept entries stays.

    Args:
        mask: Any shape and device.
        generator: On the CPU, so that every device gives the same mask.
    """
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    return mask.reshape(-1)[order].view(mask.shape)


def schedule_counts(
    total: int,
    count: int,
    rounds: int,
    schedule: Literal["exponential", "linear"],
    *,
    ratio: float | None = None,
) -> list[int]:
    """Return how many weights are left after each of `rounds` rounds.

    After round t = 1..T the share rho_t = ratio^(t/T), or 1 - (1 - ratio) t / T, is left of them:
    floor((1 - rho_t) total) weights are gone, as in the code of Tanaka et al. 2020. The numbers
    never grow, and the last is `count`.

    Args:
        total: Number of weights before the first round.
        count: Number of weights after the last.
        rounds: T.
        schedule: Which rho_t.
        ratio: What `count` is rounded from; a small share of many weights must not be rounded
            before it is raised to a power. `count / total` when `None`.
    """
    assert 0 <= count <= total
    assert rounds >= 1
    ratio = count / total if ratio is None else ratio
    left = []
    for number in range(1, rounds):
        part = number / rounds
        share = ratio**part if schedule == "exponential" else 1 - (1 - ratio) * part
        left.append(max(count, total - floor((1 - share) * total)))
    left.append(count)
    assert all(after <= before for before, after in pairwise([total, *left]))
    return left


def _largest(scores: Sequence[Tensor], count: int) -> list[PackedMask]:
    """Return masks: True at the `count` largest scores, of equal ones the first."""
    least = torch.float32 if scores[0].is_floating_point() else torch.int64
    dtype = reduce(torch.promote_types, (score.dtype for score in scores), least)
    last, num_equal = _cut(scores, count, dtype)

    def kept(score: Tensor) -> Iterator[Tensor]:
        nonlocal num_equal
        for keys in _keys(score, dtype):
            part = keys > last
            if num_equal > 0:
                equal = (keys == last).nonzero().squeeze(1)[:num_equal]
                part[equal] = True
                num_equal -= len(equal)
            yield part

    masks = [PackedMask(score.shape, score.device) for score in scores]
    for score, mask in zip(scores, masks, strict=True):
        mask.write(kept(score))
    return masks


def _cut(scores: Sequence[Tensor], count: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the key of the last score that stays, and how many with this key do.

    Histograms of ever lower digits narrow down where it is, until what is left is small.
    """
    device, integers = scores[0].device, _INTEGERS[dtype.itemsize]
    low, high, shift = torch.iinfo(integers).min, torch.iinfo(integers).max, 8 * dtype.itemsize
    if count == 0:
        return high, 0
    num_left, missing = sum(score.numel() for score in scores), count
    while num_left > _CHUNK and low < high:
        shift -= _DIGIT
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=device)
        for keys in _keys_between(low, high, scores, dtype):
            histogram += ((keys >> shift) - (low >> shift)).bincount(minlength=1 << _DIGIT)
        from_above = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, missing))
        num_left = int(histogram[-1 - place])
        missing -= int(from_above[place]) - num_left
        low += ((1 << _DIGIT) - 1 - place) << shift
        high = low + (1 << shift) - 1
    if low == high:
        return low, missing
    # No list of parts: they would pin the memory of the chunks that are freed between them.
    left, start = torch.empty(num_left, dtype=integers, device=device), 0
    for keys in _keys_between(low, high, scores, dtype):
        left[start : start + len(keys)] = keys
        start += len(keys)
    last = left.kthvalue(num_left - missing + 1).values
    return int(last), missing - int((left > last).sum())


def _keys_between(
    low: int, high: int, scores: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    of_all = torch.iinfo(_INTEGERS[dtype.itemsize])
    for keys in chain.from_iterable(_keys(score, dtype) for score in scores):
        is_all = (low, high) == (of_all.min, of_all.max)
        yield keys if is_all else keys[(keys >= low) & (keys <= high)]


def _keys(scores: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield integers that are ordered as the scores are, a chunk at a time; -0.0 is 0.0."""
    for chunk in scores.reshape(-1).split(_CHUNK):
        if not dtype.is_floating_point:
            yield chunk.to(dtype)
            continue
        bits = (chunk.to(dtype) + 0.0).view(_INTEGERS[dtype.itemsize])
        # Of two negative numbers, the one with the larger bits is the smaller.
        yield bits ^ ((bits >> (8 * dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _equal_shares(sizes: Sequence[int], count: int) -> list[int]:
    """Split `count` in proportion to `sizes`, in whole numbers, by the method of Webster.

    Entry j = 1, 2, ... of tensor l is number (j - 1/2) / sizes[l] in line, and the first `count`
    stay. So a larger `count` never takes an entry from a tensor, as largest remainders may.
    """

    def place(index: int, entry: int) -> tuple[Fraction, int]:
        return Fraction(2 * entry - 1, sizes[index]), index

    total, indices = sum(sizes), range(len(sizes))
    counts = [(2 * count * size + total) // (2 * total) for size in sizes]
    while sum(counts) < count:
        counts[min(indices, key=lambda i: place(i, counts[i] + 1))] += 1
    while sum(counts) > count:
        counts[max(indices, key=lambda i: place(i, counts[i]))] -= 1
    return counts


def former_shares(sizes: Sequence[int], count: int) -> list[int]:
    """Split `count` in proportion to `sizes` by largest remainders, as earlier versions did.

    Files of theirs that keep a seed in place of positions mean the positions of this split.
    """
    total = sum(sizes)
    counts = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts
