"""Weights that are kept from one evaluation batch to the next while their parts stay the same."""

import resource
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

__all__ = ["KeptWeights", "has_room"]

# Of the memory that is free, what all kept weights together may take.
_SHARE = 0.25


class _Kept(NamedTuple):
    copies: list[Tensor]
    """Of the parts: `.data` and other views change them and leave no trace."""
    inference: bool
    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(copy.nbytes for copy in self.copies)


class KeptWeights:
    """Weights by number, each with copies of what it was computed from. A copy of this is empty."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def __reduce__(self) -> tuple[type["KeptWeights"], tuple[()]]:
        """Leave out the weights."""
        return KeptWeights, ()

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()

    def weight(self, index: int, parts: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Return weight number `index`: the one that is kept, or a new one, kept if there is room.

        Args:
            index: Of the weight.
            parts: All trained tensors that it depends on.
            compute: Computes it.
        """
        known = self._kept.get(index)
        inference = torch.is_inference_mode_enabled()
        if (
            known is not None
            and known.inference == inference
            and all(map(_is_same, parts, known.copies))
        ):
            return known.weight
        self._kept.pop(index, None)
        weight = compute()
        needed = weight.nbytes + sum(part.nbytes for part in parts)
        if has_room(needed + sum(kept.nbytes for kept in self._kept.values()), weight.device):
            copies = [part.detach().clone() for part in parts]
            self._kept[index] = _Kept(copies, inference, weight)
        return weight


def _is_same(part: Tensor, copy: Tensor) -> bool:
    return (
        part.dtype == copy.dtype
        and part.device == copy.device
        and part.shape == copy.shape
        and torch.equal(part, copy)
    )


def has_room(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are a small part of the memory that is free on a device.

    On the CPU, a limit on the address space counts as well.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size <= _SHARE * free
    free = psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - psutil.Process().memory_info().vms)
    return size <= _SHARE * free
