"""What depends on the slots alone, computed once for all layers and both directions of a step."""

import torch
from torch import Tensor

__all__ = ["Prepared"]


class Prepared:
    """Forms of one vector of slots, each computed when it is first asked for, and kept.

    It belongs to one value of the slots: make a new one when they change. Numbers kept: 2m for
    `doubled`, 4m for `signed`, about 2m to 4m for each `spectrum`; m for `plain` in another dtype.
    """

    def __init__(self, slots: Tensor, *, lasts: bool = False) -> None:
        """Take the slots.

        Args:
            slots: Shape (m,), float32 or float64, without a graph.
            lasts: Whether many batches come: rows that had to be built are kept.
        """
        self.slots = slots
        self.lasts = lasts
        self.rows: dict[object, Tensor] = {}
        """Kept rows, by what has built them."""
        self._plain: dict[torch.dtype, Tensor] = {}
        self._doubled: dict[torch.dtype, Tensor] = {}
        self._signed: dict[torch.dtype, Tensor] = {}
        self._spectra: dict[tuple[int, int, int], Tensor] = {}

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the slots, shape (m,)."""
        if dtype == self.slots.dtype:
            return self.slots
        if dtype not in self._plain:
            self._plain[dtype] = self.slots.to(dtype)
        return self._plain[dtype]

    def doubled(self, dtype: torch.dtype) -> Tensor:
        """Return the slots twice, in which every window is contiguous: shape (2m,)."""
        if dtype not in self._doubled:
            doubled = self._doubled[dtype] = self.slots.to(dtype).repeat(2)
            if dtype == self.slots.dtype:
                self.slots = doubled[: len(self.slots)]
        return self._doubled[dtype]

    def signed(self, dtype: torch.dtype) -> Tensor:
        """Return the slots twice, then the negated slots twice: shape (4m,)."""
        if dtype not in self._signed:
            doubled = self.doubled(dtype)
            self._signed[dtype] = torch.cat((doubled, -doubled))
        return self._signed[dtype]

    def spectrum(self, length: int, hop: int, count: int) -> Tensor:
        """Transform overlapping blocks of the circular vector.

        Args:
            length: Slots in each block, which begin `hop` slots after each other.
            hop: See above.
            count: Number of blocks.

        Returns:
            conj(rfft(block)), complex, shape (count, length // 2 + 1). Slots from 2m on count as 0.
        """
        key = (length, hop, count)
        if key not in self._spectra:
            doubled = self.doubled(self.slots.dtype)
            extended = doubled.new_zeros((count - 1) * hop + length)
            known = min(len(extended), len(doubled))
            extended[:known] = doubled[:known]
            blocks = torch.fft.rfft(extended.unfold(0, length, hop))
            self._spectra[key] = torch.conj_physical_(blocks)
        return self._spectra[key]
