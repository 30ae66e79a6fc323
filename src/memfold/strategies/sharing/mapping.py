"""What a mapping from weights to shared slots must offer, without storing an index."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor

from memfold.compression.selection import CompressibleWeight
from memfold.strategies.sharing.hashing import RangeHash
from memfold.strategies.sharing.products import RowLayout
from memfold.strategies.sharing.signs import OuterSigns
from memfold.strategies.sharing.whole_model import TensorByTensor, WholeModel

__all__ = ["Hashes", "Sign", "SlotMapping", "Span", "spans_of"]

# Tables of signs are kept for tensors whose tables take no more bytes.
_KEPT_BYTES = 1 << 16

Sign = Literal["column", "run", "weight"]
"""What has a random sign of its own: each row and each column of a tensor (`column`), each window
of consecutive slots (`run`), or each weight."""


@dataclass(frozen=True)
class Span:
    """Where one weight tensor lies in the flattened model, in registration order."""

    name: str
    shape: torch.Size
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Weights in a row: what the first dimension counts are rows."""
        return self.numel // self.shape[0]


def spans_of(
    weights: Sequence[CompressibleWeight], firsts: Mapping[int, int] | None = None
) -> tuple[Span, ...]:
    """Lay the weights end to end.

    Args:
        weights: Of the model.
        firsts: Number of a weight -> that of an earlier one, whose span it has; of those that do
            not lie in one of their own.
    """
    spans: list[Span] = []
    start = 0
    for index, weight in enumerate(weights):
        first = (firsts or {}).get(index, index)
        if first == index:
            spans.append(Span(weight.name, weight.shape, start, start + weight.numel))
            start += weight.numel
        else:
            spans.append(spans[first])
    return tuple(spans)


class Hashes:
    """What is hashed once for a pass; a mapping has its own kind, if it has one."""

    nbytes: int = 0
    """Bytes of all that a pass makes of it."""


class SlotMapping(ABC):
    """Assign each of n weights a slot h(i) in [0, m) and a sign g_i, by hashing alone.

    Immutable: whatever depends on n or m is computed anew for each pass and dropped, but for small
    tables of signs. Indices and signs are whole numbers, so that they agree on every device and
    dtype.
    """

    def __init__(self, spans: Sequence[Span], num_slots: int, *, seed: int, sign: Sign) -> None:
        """Keep what follows from the options.

        Args:
            spans: Of each weight; end to end, but for weights that have the span of an earlier one.
            num_slots: The m of the papers.
            seed: Of every hash.
            sign: See `Sign`.
        """
        self.spans = tuple(spans)
        self.num_slots = num_slots
        self.num_weights = max(span.stop for span in self.spans)
        self.seed = seed
        self.sign: Sign = sign
        self._signs: dict[tuple[str, torch.device], OuterSigns] = {}
        self._known_hashes: ref[Hashes] | None = None

    def signs(self, span: Span, device: torch.device | str = "cpu") -> OuterSigns | None:
        """Return the signs of a tensor's weights that do not belong to windows.

        With a sign per column, that of the weight in row i and column j of the tensor, taken as a
        matrix (first dimension, all others), is r_i c_j: inner products with rows, and with
        columns, see independent signs. With a sign per weight, its number in the model is hashed.

        Args:
            span: One of `spans`.
            device: Of the tables.

        Returns:
            `None` with a sign per window.
        """
        if self.sign == "run":
            return None
        key = span.name, torch.device(device)
        found = self._signs.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self.hash_signs(span).to(key[1])
            if found.nbytes <= _KEPT_BYTES:
                self._signs[key] = found
        return found

    def hash_signs(self, span: Span) -> OuterSigns:
        """Compute what `signs` keeps, on the CPU; not with a sign per window."""
        if self.sign == "weight":
            return RangeHash(self.seed, "weight-sign").signs(span.start, span.stop)
        rows, columns = (
            RangeHash(self.seed, f"{what}-sign", span.name).signs(0, count).expand(0, count)
            for what, count in (("row", span.shape[0]), ("column", span.columns))
        )
        return OuterSigns(rows, columns)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tables that are kept from pass to pass."""
        return sum(signs.nbytes for signs in self._signs.values())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed again."""
        return {**self.__dict__, "_signs": {}, "_known_hashes": None}

    @property
    def is_bijection(self) -> bool:
        """Whether every slot holds exactly one weight, whichever layers use it."""
        return False

    @property
    def has_copies(self) -> bool:
        """Whether weights have the span of an earlier one."""
        return len(set(self.spans)) < len(self.spans)

    def hashes(self) -> Hashes:
        """Compute what one pass needs several times; found again while something holds it."""
        known = self._known_hashes() if self._known_hashes is not None else None
        if known is None:
            known = self._compute_hashes()
            self._known_hashes = ref(known)
        return known

    def _compute_hashes(self) -> Hashes:
        return Hashes()

    def layout(self, span: Span) -> RowLayout | None:
        """Tell where the rows of one tensor lie, as a matrix (first dimension, all others).

        Args:
            span: One of `spans`.

        Returns:
            `None` if rows are not made of windows of consecutive slots.
        """
        del span
        return None

    @abstractmethod
    def gather(
        self, slots: Tensor, span: Span, factor: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Read one tensor: `factor * g_i * slots[h(i)]` for i in the span.

        Args:
            slots: Shape (m,).
            span: One of `spans`.
            factor: The same for all of its weights.
            dtype: Of the result; that of `slots` if not given.

        Returns:
            Shape (span.numel,), a new tensor on the device of `slots`.
        """

    @abstractmethod
    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """Add the adjoint of `gather` to `out`: `out[h(i)] += factor * g_i * weights[i]`.

        Args:
            weights: Shape (span.numel,), contiguous, of any floating dtype; left as it is.
            span: One of `spans`.
            factor: The same for all of its weights.
            out: Shape (m,), float32 or float64, changed in place.
        """

    def add_weight(
        self, weight: Tensor, span: Span, factor: float, out: Tensor, zero_row: int | None
    ) -> None:
        """Scatter a tensor of any layout, but for one row that takes no part.

        Args:
            weight: The span's shape, dense or sparse; left as it is.
            span: One of `spans`.
            factor: The same for all of its weights.
            out: Shape (m,), float32 or float64, changed in place.
            zero_row: Index into the first dimension, or none.
        """
        if weight.is_sparse:
            weight = weight.to_dense()
        if zero_row is not None:
            weight = weight.clone()
            weight[zero_row].zero_()
        self.scatter(weight.reshape(-1), span, factor, out)

    def whole(
        self,
        factors: Sequence[float],
        zero_rows: Sequence[int | None],
        slot_factors: tuple[Tensor, Tensor],
    ) -> WholeModel:
        """Compute once what building all tensors at the same time takes.

        Args:
            factors: One for each span.
            zero_rows: Row of each tensor that stays zero, if there is one.
            slot_factors: 1 / nu and Gamma / nu, each of shape (segments,), float32 or float64.
        """
        return TensorByTensor(self, factors, zero_rows, slot_factors)

    @abstractmethod
    def accumulate(self, constants: Sequence[float]) -> Tensor:
        """Sum over the weights in each slot a constant that depends on their span alone.

        Args:
            constants: One for each span. Ones give the loads.

        Returns:
            Shape (segments,), float64, on the CPU: one number for each segment of consecutive
            slots that is treated alike; `scale` knows them. No cancellation takes place: constants
            may differ by any factor.
        """

    def scale(self, slots: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply every slot by its segment's factor.

        Args:
            slots: Shape (m,).
            factors: Shape (segments,), of the same dtype and device.
            out: Where to put the result, a new tensor if not given; may be `slots`.

        Returns:
            Shape (m,).
        """
        return torch.mul(slots, factors, out=out)
