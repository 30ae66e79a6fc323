"""RANDOMFOLD of a whole small model: its partitions are the rows of one matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memfold.strategies.sharing.fold import scale_segments
from memfold.strategies.sharing.signs import OuterSigns
from memfold.strategies.sharing.whole_model import WholeModel

if TYPE_CHECKING:
    from memfold.strategies.sharing.mapping import SlotMapping

__all__ = ["WholeFold"]

# From this many partitions on, a table that all of them are read from is worth making.
_TABLE_PARTITIONS = 12


class _Factors(NamedTuple):
    """What consecutive weights of a tensor are multiplied with, as a matrix."""

    begin: int
    """Number of the first weight in the tensor."""
    rows: Tensor
    """Shape (rows, 1)."""
    columns: Tensor
    """Shape (columns,)."""

    def matrix_in(self, tensor: Tensor, offset: int) -> Tensor:
        """Return these weights out of a contiguous tensor whose first one lies at `offset`."""
        rows, columns = self.rows.shape[0], self.columns.shape[0]
        return tensor.as_strided((rows, columns), (columns, 1), offset + self.begin)


_Tables = list[list[_Factors]]


class WholeFold(WholeModel):
    """Weight number i of the model is factor_i slots[(r_k + i mod m) mod m], k = i // m.

    Its factor is lambda and a product of signs. Partition k, rotated, is a window of the vector
    that holds all slots twice, and its rotation back a window of the partition, held twice.
    """

    def __init__(
        self,
        mapping: "SlotMapping",
        factors: Sequence[float],
        zero_rows: Sequence[int | None],
        slot_factors: tuple[Tensor, Tensor],
        *,
        rotations: Tensor,
        segments: Tensor,
        signs: Sequence[OuterSigns],
    ) -> None:
        """Take what the mapping has hashed.

        Args:
            mapping: Whose partitions are consecutive weights, m in each but the last.
            factors: See `SlotMapping.whole`.
            zero_rows: See `SlotMapping.whole`.
            slot_factors: See `SlotMapping.whole`.
            rotations: r_k, int32, shape (partitions,).
            segments: Slots of each segment, int32, shape (segments,).
            signs: Of each weight's numbers.
        """
        super().__init__(mapping, factors, zero_rows, slot_factors)
        self._rotations = rotations
        self._segments = segments
        self._signs = signs
        pairs = zip(signs, mapping.spans, strict=True)
        self._parts = [list(table.cut(0, span.numel)) for table, span in pairs]
        self._few = rotations.tolist() if len(rotations) < _TABLE_PARTITIONS else None

    @property
    def nbytes(self) -> int:
        """See `WholeModel.nbytes`."""
        signs = sum(signs.nbytes for signs in self._signs)
        return self._rotations.nbytes + self._segments.nbytes + signs

    def scale(self, slots: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """See `WholeModel.scale`."""
        return scale_segments(slots, factors, self._segments, out)

    def tables(self) -> _Tables:
        """See `WholeModel.tables`: signs as floating-point numbers, times lambda."""
        return [
            [
                _Factors(begin, rows.to(self.dtype), columns * factor)
                for begin, _, rows, columns in parts
            ]
            for parts, (_, factor, _) in zip(self._parts, self.tensors, strict=True)
        ]

    def read(self, slots: Tensor, tables: _Tables) -> list[Tensor]:
        """See `WholeModel.read`."""
        if self._few is not None:
            flat = torch.cat([part for r in self._few for part in (slots[r:], slots[:r])])
        else:
            m = self.mapping.num_slots
            windows = torch.cat((slots, slots)).as_strided((m, m), (1, 1))
            flat = windows.index_select(0, self._rotations).view(-1)
        weights = []
        for (span, _, row), factors in zip(self.tensors, tables, strict=True):
            for factor in factors:
                factor.matrix_in(flat, span.start).mul_(factor.rows).mul_(factor.columns)
            weight = flat[span.start : span.stop].view(span.shape)
            if row is not None:
                weight[row].zero_()
            weights.append(weight)
        return weights

    def fold(self, gradients: Sequence[Tensor | None], tables: _Tables) -> Tensor:
        """See `WholeModel.fold`."""
        count, m = len(self._rotations), self.mapping.num_slots
        flat = torch.empty(count * m, dtype=self.dtype, device=self.device)
        flat[self.mapping.num_weights :].zero_()
        given = zip(gradients, self.tensors, tables, strict=True)
        for gradient, (span, _, row), factors in given:
            if gradient is None:
                flat[span.start : span.stop].zero_()
                continue
            dense = (gradient.to_dense() if gradient.is_sparse else gradient).contiguous()
            offset = int(dense.storage_offset())
            for factor in factors:
                matrix = factor.matrix_in(flat, span.start)
                torch.mul(factor.matrix_in(dense, offset), factor.rows, out=matrix)
                matrix.mul_(factor.columns)
            if row is not None:
                flat[span.start : span.stop].view(span.shape)[row].zero_()
        return self._rotate_back(flat.view(count, m))

    def _rotate_back(self, partitions: Tensor) -> Tensor:
        count, m = partitions.shape
        if self._few is not None:
            out = partitions.new_zeros(m)
            for row, r in zip(partitions, self._few, strict=True):
                out[r:].add_(row[: m - r])
                out[:r].add_(row[m - r :])
            return out
        size = 2 * m
        windows = torch.cat((partitions, partitions), 1).as_strided(
            (size * count - m + 1, m), (1, 1)
        )
        starts = torch.arange(m, size * count, size, device=self.device).sub_(self._rotations)
        return windows.index_select(0, starts).sum(0)
