"""What a mapping from weights to shared slots must offer, without storing an index."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memfold.strategies.selection import CompressibleWeight
from memfold.strategies.sharing.hashing import RangeHash, hash_signs

__all__ = ["Sign", "SlotMapping", "Span", "spans_of"]

Sign = Literal["run", "weight"]


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


def spans_of(weights: Sequence[CompressibleWeight]) -> tuple[Span, ...]:
    """Lay the weights end to end."""
    spans: list[Span] = []
    for weight in weights:
        start = spans[-1].stop if spans else 0
        spans.append(Span(weight.name, weight.shape, start, start + weight.numel))
    return tuple(spans)


class SlotMapping(ABC):
    """Assign each of n weights a slot h(i) in [0, m) and a sign g_i, by hashing alone.

    Immutable and of constant size: whatever depends on n or m is computed anew for each call and
    dropped. Indices and signs are whole numbers, so that they agree on every device and dtype.
    """

    def __init__(self, spans: Sequence[Span], num_slots: int, *, seed: int, sign: Sign) -> None:
        """Keep what follows from the options.

        Args:
            spans: All weights, end to end.
            num_slots: The m of the papers.
            seed: Of every hash.
            sign: One random sign per contiguous run of slots, or one per weight.
        """
        self.spans = tuple(spans)
        self.num_slots = num_slots
        self.num_weights = self.spans[-1].stop
        self.seed = seed
        self.sign: Sign = sign

    def weight_signs(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Hash the signs of weights number start, ..., stop - 1, in dtype and device of `like`."""
        hashed = RangeHash(self.seed, "weight-sign")(start, stop, like.device)
        return hash_signs(hashed).to(like.dtype)

    @property
    def is_bijection(self) -> bool:
        """Whether every slot holds exactly one weight."""
        return False

    @abstractmethod
    def gather(self, slots: Tensor, span: Span, factor: float) -> Tensor:
        """Read one tensor: `factor * g_i * slots[h(i)]` for i in the span.

        Args:
            slots: Shape (m,).
            span: One of `spans`.
            factor: The same for all of its weights.

        Returns:
            Shape (span.numel,), a new tensor of the dtype and device of `slots`.
        """

    @abstractmethod
    def scatter(self, weights: Tensor, span: Span, factor: float, out: Tensor) -> None:
        """Add the adjoint of `gather` to `out`: `out[h(i)] += factor * g_i * weights[i]`.

        Args:
            weights: Shape (span.numel,), contiguous.
            span: One of `spans`.
            factor: The same for all of its weights.
            out: Shape (m,), of the same dtype, changed in place.
        """

    @abstractmethod
    def accumulate(
        self, constants: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Sum over the weights in each slot a constant that depends on their span alone.

        Args:
            constants: One for each span. Ones give the loads.
            device: Of the result.
            dtype: Of the result, float32 or float64.

        Returns:
            Shape (m,). No cancellation takes place: constants may differ by any factor.
        """
