"""HashedNets: every weight hashed on its own, into a vector of its layer.

Chen, Wilson, Tyree, Weinberger and Chen, "Compressing neural networks with the hashing trick"
(ICML 2015, arXiv 1504.04788). Tensor l has K_l values; weight i is xi(i) w[h(i)] with a random
sign xi. The loads are random (balls in bins), and no two neighbours lie side by side in memory:
every weight costs a hash and a random access, in both directions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memfold.compression.budget import share_budget
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.hashing import RangeHash, xor_tables
from memfold.strategies.sharing.mapping import Hashes, Sign, SlotMapping, Span
from memfold.strategies.sharing.signs import OuterSigns

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
        self._slot_hashes = {span.name: RangeHash(seed, "slot", span.name) for span in self.spans}

    def gather(
        self, slots: Tensor, span: Span, factor: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """See `SlotMapping.gather`."""
        first, stop = self._segments[span.name]
        table = slots[first:stop].mul(factor).to(dtype or slots.dtype)
        out = table.new_empty(span.numel)
        for begin, end, indices in self._chunks(span, slots.device):
            torch.index_select(table, 0, indices, out=out[begin:end])
        self._signs_of(span, slots.device).multiply_(out)
        return out

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        first, stop = self._segments[span.name]
        signs = self._signs_of(span, out.device).times(factor, out)
        for begin, end, indices in self._chunks(span, out.device):
            part = weights[begin:end].to(out.dtype, copy=True)
            signs.multiply_(part, begin)
            out[first:stop].scatter_add_(0, indices, part)

    def accumulate(self, constants: Sequence[float]) -> Tensor:
        """See `SlotMapping.accumulate`."""
        sums = torch.zeros(self.num_slots, dtype=torch.float64)
        for span, constant in zip(self.spans, constants, strict=True):
            first, stop = self._segments[span.name]
            loads = torch.zeros(stop - first, dtype=torch.int64)
            for _, _, indices in self._chunks(span, torch.device("cpu")):
                loads += torch.bincount(indices, minlength=stop - first)
            sums[first:stop] = loads.double() * constant
        return sums

    def _compute_hashes(self) -> "_Hashes":
        nbytes = sum(RangeHash.table_bytes(span.numel) for span in self.spans)
        return _Hashes(self._slot_hashes, nbytes)

    def _signs_of(self, span: Span, device: torch.device) -> OuterSigns:
        signs = self.signs(span, device)
        assert signs is not None
        return signs

    def _chunks(self, span: Span, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Hash a span piece by piece: weights begin, ..., end - 1, their places in its segment."""
        first, stop = self._segments[span.name]
        hashes = self.hashes()
        assert isinstance(hashes, _Hashes)
        high, low = hashes.tables(span, device)
        for begin in range(0, span.numel, _CHUNK_NUMEL):
            end = min(begin + _CHUNK_NUMEL, span.numel)
            hashed = xor_tables(high, low, begin, end)
            yield begin, end, hashed.mul_(stop - first).bitwise_right_shift_(31)


class _Hashes(Hashes):
    """The tables that slots are hashed with, made when they are asked for."""

    def __init__(self, hashes: Mapping[str, RangeHash], nbytes: int) -> None:
        self._hashes = hashes
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self.nbytes = nbytes

    def tables(self, span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the tables of one tensor: see `RangeHash.tables`."""
        key = span.name, device
        if key not in self._tables:
            self._tables[key] = self._hashes[span.name].tables(span.numel, device)
        return self._tables[key]


@dataclass(frozen=True, kw_only=True)
class HashedNet(SharingStrategy, name="hashednet"):
    """One vector per tensor, hashed weight by weight. Every weight is a window of its own."""

    sign: Sign = "run"
    """See `SharingStrategy.sign`; `run` and `weight` are the same, the paper's form."""

    def least_values(self, weights: Sequence[CompressibleWeight]) -> int:
        """See `SharingStrategy.least_values`: one per tensor."""
        return len(weights)

    def mapping(self, spans: Sequence[Span], num_slots: int) -> ElementMapping:
        """Make the mapping for `num_slots` values.

        Raises:
            InputError: There is less than one value per tensor.
        """
        if num_slots < len(spans):
            raise InputError(
                f"ratio gives {num_slots} values for {len(spans)} tensors; hashednet needs one "
                "value per tensor: raise ratio or narrow compression.include"
            )
        return ElementMapping(spans, num_slots, seed=self.seed, sign=self.sign)
