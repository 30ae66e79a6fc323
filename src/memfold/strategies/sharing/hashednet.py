"""HashedNets: every weight hashed on its own, into a vector of its layer.

Chen, Wilson, Tyree, Weinberger and Chen, "Compressing neural networks with the hashing trick"
(ICML 2015, arXiv 1504.04788). Tensor l has K_l values; weight i is xi(i) w[h(i)] with a random
sign xi. The loads are random (balls in bins), and no two neighbours lie side by side in memory:
every weight costs a hash and a random access, in both directions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.hashing import RangeHash, scale_below
from memfold.strategies.sharing.mapping import Sign, SlotMapping, Span

__all__ = ["ElementMapping", "HashedNet"]

# Bounds the indices that exist at one time: int64 elements.
_CHUNK_NUMEL = 1 << 16


class ElementMapping(SlotMapping):
    """Independent h(i) and sign for every weight, within the segment of its own tensor."""

    def __init__(self, spans: Sequence[Span], num_slots: int, *, seed: int, sign: Sign) -> None:
        # Every weight is a window of its own.
        super().__init__(spans, num_slots, seed=seed, sign="weight" if sign == "run" else sign)
        sizes = share_budget([span.numel for span in self.spans], num_slots)
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._segments = {span.name: (ends[i], ends[i + 1]) for i, span in enumerate(self.spans)}

    def gather(
        self, slots: Tensor, span: Span, factor: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """See `SlotMapping.gather`."""
        # A weight's sign tells which half of the table it is read from.
        table = torch.cat((slots, slots.neg())).mul_(factor).to(dtype or slots.dtype)
        out = table.new_empty(span.numel)
        for part, indices, negative in self._chunks(span, slots.device):
            torch.index_select(table, 0, indices.add_(negative * self.num_slots), out=out[part])
        return out

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        m = self.num_slots
        table = out.new_zeros(2 * m)
        for part, indices, negative in self._chunks(span, out.device):
            table.index_add_(0, indices.add_(negative * m), weights[part].to(out.dtype))
        out.add_(table[:m].sub_(table[m:]), alpha=factor)

    def accumulate(self, constants: Sequence[float]) -> Tensor:
        """See `SlotMapping.accumulate`."""
        sums = torch.zeros(self.num_slots, dtype=torch.float64)
        for span, constant in zip(self.spans, constants, strict=True):
            first, stop = self._segments[span.name]
            loads = torch.zeros(stop - first, dtype=torch.int64)
            for _, indices, _ in self._chunks(span, torch.device("cpu")):
                loads += torch.bincount(indices - first, minlength=stop - first)
            sums[first:stop] = loads.double() * constant
        return sums

    def _chunks(self, span: Span, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Hash a span piece by piece: where, slots and whether the sign is -1, both int64."""
        first, stop = self._segments[span.name]
        slot_hash = RangeHash(self.seed, "slot", span.name)
        hashed = self.signs(span, device)
        assert hashed is not None
        for begin in range(0, span.numel, _CHUNK_NUMEL):
            end = min(begin + _CHUNK_NUMEL, span.numel)
            indices = scale_below(stop - first, slot_hash(begin, end, device)) + first
            yield slice(begin, end), indices, (hashed.expand(begin, end) < 0).long()


@dataclass(frozen=True, kw_only=True)
class HashedNet(SharingStrategy, name="hashednet"):
    """One vector per tensor, hashed weight by weight. Every weight is a window of its own."""

    sign: Sign = "run"
    """See `SharingStrategy.sign`; `run` and `weight` are the same, the paper's form."""

    def mapping(self, spans: Sequence[Span], num_slots: int) -> ElementMapping:
        """Make the mapping for `num_slots` values.

        Raises:
            InputError: There is less than one value per tensor.
        """
        if num_slots < len(spans):
            raise InputError(
                f"ratio gives {num_slots} values for {len(spans)} tensors; hashednet needs one "
                "value per tensor: raise ratio (or budget_bytes) or narrow compression.include"
            )
        return ElementMapping(spans, num_slots, seed=self.seed, sign=self.sign)


def share_budget(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` values in proportion to `sizes`, at least one each, exactly.

    What rounding down leaves goes to the largest remainders, the earlier tensor first.
    """
    spare = total - len(sizes)
    rest = [size - 1 for size in sizes]
    whole = max(1, sum(rest))
    shares = [1 + spare * size // whole for size in rest]
    order = sorted(range(len(sizes)), key=lambda i: (-(spare * rest[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
