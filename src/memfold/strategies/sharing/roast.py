"""ROAST: tiles of the weights hashed into one vector for the whole model.

Desai, Zhou and Shrivastava, "Hardware-aware compression with random operation access specific
tile (ROAST) hashing" (ICML 2023). Every tile of Z = rows x columns weights is one contiguous
chunk of the vector, at a random start in [0, m - Z]. Tiles overlap at arbitrary offsets: the
loads are random, slots stay unused even at m = n, and the dense model is not recovered there.
A tensor with more than two dimensions is viewed as (first, all others).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.options import Count
from memfold.strategies.sharing.base import SharingStrategy
from memfold.strategies.sharing.hashing import PolynomialHash
from memfold.strategies.sharing.mapping import Hashes, Sign, SlotMapping, Span

__all__ = ["ROAST", "TileMapping"]

_SCATTER_NUMEL = 1 << 18


class _Hashes(Hashes):
    """What `TileMapping._hash` returns for each tensor, by its name."""

    def __init__(self, tiles: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> None:
        self.tiles = tiles
        arrays = (array for pair in tiles.values() for array in pair if array is not None)
        self.nbytes = sum(array.nbytes for array in arrays)


class TileMapping(SlotMapping):
    """h = start of the tile + row-major position in the tile; a window is a tile."""

    def __init__(
        self,
        spans: Sequence[Span],
        num_slots: int,
        *,
        seed: int,
        sign: Sign,
        tile: tuple[int, int],
    ) -> None:
        super().__init__(spans, num_slots, seed=seed, sign=sign)
        self._rows, self._columns = tile

    def gather(
        self, slots: Tensor, span: Span, factor: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """See `SlotMapping.gather`; whole tiles are read, edges are cut off."""
        rows, columns = _matrix_shape(span)
        high, wide = self._grid(span)
        starts, signs = self._tiles(span, slots.device)
        windows = slots.unfold(0, self._rows * self._columns, 1).index_select(0, starts)
        if signs is not None:
            windows.mul_((signs * factor).to(slots.dtype)[:, None])
        tiles = windows.view(high, wide, self._rows, self._columns).transpose(1, 2)
        matrix = tiles.reshape(high * self._rows, wide * self._columns)
        out = matrix[:rows, :columns].reshape(-1)
        hashed = self.signs(span, out.device)
        if hashed is not None:
            hashed.times(factor, out).multiply_(out)
        return out.to(dtype or out.dtype)

    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """See `SlotMapping.scatter`."""
        _, columns = _matrix_shape(span)
        high, wide = self._grid(span)
        starts, signs = self._tiles(span, out.device)
        # Whole rows of tiles; what no weight fills is zero.
        flat = out.new_empty(high * self._rows * columns)
        flat[: span.numel].copy_(weights)
        flat[span.numel :].zero_()
        hashed = self.signs(span, out.device)
        if hashed is not None:
            hashed.times(factor, out).multiply_(flat[: span.numel])
        matrix = flat.view(-1, columns)
        if columns != wide * self._columns:
            matrix = pad(matrix, (0, wide * self._columns - columns))
        tiles = matrix.view(high, self._rows, wide, self._columns).transpose(1, 2)
        chunks = tiles.reshape(high * wide, -1)
        if signs is not None:
            chunks.mul_((signs * factor).to(out.dtype)[:, None])
        positions = torch.arange(chunks.shape[1], dtype=starts.dtype, device=out.device)
        step = max(1, _SCATTER_NUMEL // chunks.shape[1])
        for part, first in zip(chunks.split(step), starts.split(step), strict=True):
            slots = (first[:, None] + positions).long()
            out.scatter_add_(0, slots.view(-1), part.view(-1))

    def accumulate(self, constants: Sequence[float]) -> Tensor:
        """See `SlotMapping.accumulate`; whole loads per tensor, so that nothing cancels."""
        sums = torch.zeros(self.num_slots, dtype=torch.float64)
        for span, constant in zip(self.spans, constants, strict=True):
            sums.add_(torch.from_numpy(self._loads(span)), alpha=constant)
        return sums

    def _loads(self, span: Span) -> np.ndarray:
        """Count the weights in each slot: the running sum of tile rows that begin and end."""
        rows, columns = _matrix_shape(span)
        high, wide = self._grid(span)
        starts = self._hash(span)[0].astype(np.int64).reshape(high, wide, 1)
        row = np.arange(self._rows)
        exists = np.arange(high)[:, None, None] * self._rows + row < rows
        first = starts + row * self._columns
        length = np.minimum(columns - np.arange(wide) * self._columns, self._columns)
        exists = np.broadcast_to(exists, first.shape)
        last = (first + length[:, None])[exists]
        m = self.num_slots
        edges = np.bincount(first[exists], minlength=m + 1) - np.bincount(last, minlength=m + 1)
        return np.cumsum(edges)[:-1]

    def _grid(self, span: Span) -> tuple[int, int]:
        rows, columns = _matrix_shape(span)
        return -(-rows // self._rows), -(-columns // self._columns)

    def _compute_hashes(self) -> _Hashes:
        return _Hashes({span.name: self._hash(span) for span in self.spans})

    def _hash(self, span: Span) -> tuple[np.ndarray, np.ndarray | None]:
        """Start (int32) and sign (int8) of each tile, row-major, shape (tiles,)."""
        high, wide = self._grid(span)
        keys = np.arange(high * wide)
        starts = PolynomialHash(self.seed, "tile", span.name).below(
            self.num_slots - self._rows * self._columns + 1, keys
        )
        starts = starts.astype(np.int32)
        if self.sign != "run":
            return starts, None
        signs = PolynomialHash(self.seed, "tile-sign", span.name).signs(keys)
        return starts, signs.astype(np.int8)

    def _tiles(self, span: Span, device: torch.device) -> tuple[Tensor, Tensor | None]:
        hashes = self.hashes()
        assert isinstance(hashes, _Hashes)
        starts, signs = hashes.tiles[span.name]
        signs_there = None if signs is None else torch.from_numpy(signs).to(device)
        return torch.from_numpy(starts).to(device), signs_there


@dataclass(frozen=True, kw_only=True)
class ROAST(SharingStrategy, name="roast"):
    """One vector for the whole model, hashed tile by tile."""

    tile_rows: Count = 16
    """Rows of a tile: output features or channels."""
    tile_columns: Count = 16
    """Columns of a tile: all other dimensions, flattened."""

    def least_values(self, weights: Sequence[CompressibleWeight]) -> int:
        """See `SharingStrategy.least_values`: a tile."""
        return self.tile_rows * self.tile_columns

    def mapping(self, spans: Sequence[Span], num_slots: int) -> TileMapping:
        """Make the mapping for `num_slots` values.

        Raises:
            InputError: A tile does not fit.
        """
        size = self.tile_rows * self.tile_columns
        if num_slots < size:
            raise InputError(
                f"ratio gives {num_slots} shared values, fewer than one tile of "
                f"{self.tile_rows} x {self.tile_columns} = {size}; raise ratio "
                "or lower compression.tile_rows and compression.tile_columns"
            )
        tile = (self.tile_rows, self.tile_columns)
        return TileMapping(spans, num_slots, seed=self.seed, sign=self.sign, tile=tile)


def _matrix_shape(span: Span) -> tuple[int, int]:
    return span.shape[0], span.numel // span.shape[0]
