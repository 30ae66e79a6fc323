"""Which weights stay: exact counts, and of equal scores the first."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Ranking",
    "former_shares",
    "keep_counts",
    "keep_largest",
    "schedule_counts",
    "shuffle_mask",
]


class Ranking:
    """Scores in the order in which they stay: sorted once, cut at any count.

    Memory: 8 bytes per score and, while sorting, one more copy of the scores.
    """

    def __init__(
        self, scores: Sequence[Tensor], *, scope: Literal["global", "layer"] = "global"
    ) -> None:
        """Sort the scores.

        Args:
            scores: One tensor per weight, on one device; infinite is allowed, NaN is not.
            scope: Whether all scores compete (`global`), or each tensor keeps the same share
                (`layer`).
        """
        self._shapes = [score.shape for score in scores]
        self._sizes = [score.numel() for score in scores]
        self._is_global = scope == "global"
        flat = [score.detach().reshape(-1) for score in scores]
        groups = [torch.cat(flat)] if self._is_global else flat
        self._orders = [_order(group) for group in groups]

    def counts(self, count: int) -> list[int]:
        """Return how many of each tensor stay when `count` do in all."""
        if not self._is_global:
            return _equal_shares(self._sizes, count)
        kept = self._orders[0][:count]
        ends = torch.tensor(self._sizes, device=kept.device).cumsum(0)
        owners = torch.bucketize(kept, ends, right=True)
        return owners.bincount(minlength=len(self._sizes)).tolist()

    def masks(self, count: int) -> list[Tensor]:
        """Return bool tensors of the scores' shapes: True at the `count` that stay."""
        assert 0 <= count <= sum(self._sizes)
        if self._is_global:
            parts = _mask(self._orders[0], count).split(self._sizes)
        else:
            counts = _equal_shares(self._sizes, count)
            parts = [_mask(order, n) for order, n in zip(self._orders, counts, strict=True)]
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def keep_largest(
    scores: Sequence[Tensor], count: int, *, scope: Literal["global", "layer"] = "global"
) -> list[Tensor]:
    """Keep exactly the `count` largest scores; of equal ones the first, in the order given.

    Args:
        scores: One tensor per weight, on one device, without NaN.
        count: How many stay, in all tensors together.
        scope: `global`: all scores compete. `layer`: each tensor keeps the same share of its
            scores, as nearly as whole numbers allow.

    Returns:
        Bool tensors of the scores' shapes, on their device.
    """
    return Ranking(scores, scope=scope).masks(count)


def keep_counts(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Keep exactly the `counts[l]` largest scores of tensor l; of equal ones the first.

    Returns:
        Bool tensors of the scores' shapes, on their devices.
    """
    masks = []
    for score, count in zip(scores, counts, strict=True):
        assert 0 <= count <= score.numel()
        masks.append(_largest(score.detach().reshape(-1), count).view(score.shape))
    return masks


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


def _order(flat: Tensor) -> Tensor:
    return flat.sort(descending=True, stable=True).indices


def _mask(order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[:count]] = True
    return mask


def _largest(flat: Tensor, count: int) -> Tensor:
    """Return `_mask(_order(flat), count)`, without a sort."""
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    smallest = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > smallest
    missing = count - int(mask.sum())
    mask[(flat == smallest).nonzero().squeeze(1)[:missing]] = True
    return mask


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
