"""A stream of tokens as samples: windows of consecutive tokens, each with the tokens after it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memfold.data.spec import IGNORED
from memfold.seeding import derive_seed

__all__ = ["EvaluationWindows", "TrainingWindows"]


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of `length` inputs that do not overlap and start at another place in every epoch.

    In every epoch each token but the first and last few is a target once. Where documents are kept
    apart, the windows are those of evaluation, which cross no boundary.
    """

    tokens: NDArray[np.unsignedinteger]
    """(N,), in memory or memory-mapped."""
    length: int
    offset: int = 0

    def __len__(self) -> int:
        # As many for every offset, so that epochs have as many steps.
        return (len(self.tokens) - self.length) // self.length

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, length) int64 of the windows at `positions`."""
        starts = self.offset + self.length * positions.numpy()
        taken = self.tokens[starts[:, None] + np.arange(self.length + 1)]
        batch = torch.from_numpy(taken.astype(np.int64))
        return batch[:, :-1], batch[:, 1:]

    def at_epoch(self, seed: int, epoch: int) -> "TrainingWindows":
        """Draw where the first window starts."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "windows", epoch))
        offset = int(torch.randint(self.length, (), generator=generator))
        return replace(self, offset=offset)


class EvaluationWindows:
    """Windows in which every token of a stream but its first is a target exactly once.

    The last window of a document is padded: with zeros, whose targets are `IGNORED`. With
    `stride < length` windows overlap, and only the last `stride` targets of each count, but all
    of the first: each target sees at least `length - stride` tokens before it.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        length: int,
        *,
        stride: int | None = None,
        boundaries: Sequence[int] = (),
    ) -> None:
        """Plan the windows.

        Args:
            tokens: (N,), in memory or memory-mapped.
            length: Inputs of a window.
            stride: From one window to the next; `length` by default.
            boundaries: Where documents begin, ascending, without 0: no window crosses one, and the
                first token of a document is no target.
        """
        self.tokens = tokens
        self.length = length
        stride = length if stride is None else stride
        edges = np.array([0, *boundaries, len(tokens)])
        starts, ends, firsts = [], [], []
        for begin, end in itertools.pairwise(edges):
            num_targets = max(int(end - begin) - 1, 0)
            count = -(-max(num_targets - length, 0) // stride) + (num_targets > 0)
            of_document = begin + stride * np.arange(count)
            starts.append(of_document)
            ends.append(np.full(count, end))
            counted = np.full(count, length - stride)
            counted[:1] = 0
            firsts.append(counted)
        self._starts, self._ends, self._firsts = map(np.concatenate, (starts, ends, firsts))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, length) int64 of the windows at `positions`."""
        rows = positions.numpy()
        starts, ends = self._starts[rows, None], self._ends[rows, None]
        places = starts + np.arange(self.length + 1)
        taken = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        inside = places < ends
        inputs = np.where(inside[:, :-1], taken[:, :-1], 0)
        counts = inside[:, 1:] & (np.arange(self.length) >= self._firsts[rows, None])
        targets = np.where(counts, taken[:, 1:], IGNORED)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def at_epoch(self, seed: int, epoch: int) -> "EvaluationWindows":
        """Return the windows: they are the same in every epoch."""
        return self
