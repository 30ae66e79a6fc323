"""The order in which samples are seen, and which process sees them.

Everything random is a function of (seed, epoch, sample): neither the number of processes, nor the
batch size, nor an interruption changes what a sample is made into, and the processes of a run
share every global batch without overlap.

The loaders here stand in for torch's DataLoader. With whole data sets in memory a batch is one
indexing operation, so worker processes have nothing to do; and Lightning leaves a loader that is
no DataLoader alone, where it would replace the sampler of a DataLoader by one of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.seeding import derive_seed

__all__ = [
    "Chosen",
    "EvaluationLoader",
    "EvaluationSampler",
    "Samples",
    "TrainingLoader",
    "TrainingSampler",
]


class Samples(Protocol):
    """A set of samples in memory, or memory-mapped."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return a batch (inputs, targets, ...) of the samples at int64 `positions` (B,)."""
        ...

    def at_epoch(self, seed: int, epoch: int) -> "Samples":
        """Return what training sees in an epoch: augmented, or cut at other places."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Some samples of a set."""

    samples: Samples
    positions: Tensor
    """(N,) int64, in `samples`."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the chosen samples at `positions`."""
        return self.samples[self.positions[positions]]

    def at_epoch(self, seed: int, epoch: int) -> "Chosen":
        """Choose the same of what training sees: a split changes nothing of a sample."""
        return Chosen(self.samples.at_epoch(seed, epoch), self.positions)


class TrainingSampler:
    """One process's share of the shuffled batches of an epoch.

    The samples are permuted anew for each epoch and cut into global batches of
    `batch_size * world_size`, and a global batch is cut among the processes in the order of
    their rank. So 2 processes with half the batch size train on the same global batches as 1
    process. The last incomplete global batch is dropped.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Prepare epoch 0.

        Args:
            num_samples: Size of the training set.
            batch_size: Samples per batch and process.
            seed: Of the permutations.
            rank: Of this process, in 0..world_size-1.
            world_size: Number of processes.

        Raises:
            InputError: A global batch would hold more than the training set.
        """
        self.global_batch_size = batch_size * world_size
        if self.global_batch_size > num_samples:
            raise InputError(
                f"data.batch_size={batch_size}: {world_size} process(es) times batch_size must be "
                f"at most {num_samples}, the number of training samples"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before every training epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // self.global_batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (batch_size,) int64 positions in the training set."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        for batch in range(len(self)):
            start = batch * self.global_batch_size + self.rank * self.batch_size
            yield order[start : start + self.batch_size]


class EvaluationSampler:
    """One process's share of a set that is seen once, in order: every sample in one process.

    Shares differ by one sample when the processes do not divide the set; nothing is repeated to
    make them even, so that sums over processes are exact.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Take every world_size-th sample, from number `rank` on.

        Args:
            num_samples: Size of the set.
            batch_size: Samples per batch and process, at most.
            rank: Of this process, in 0..world_size-1.
            world_size: Number of processes.

        Raises:
            InputError: Some process would have no sample at all.
        """
        if num_samples < world_size:
            raise InputError(
                f"trainer.devices: {world_size} processes for {num_samples} evaluation sample(s); "
                "each process needs at least one (see data.val_fraction)"
            )
        self._batches = torch.arange(rank, num_samples, world_size).split(batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (at most batch_size,) int64 positions in the set."""
        yield from self._batches


class EvaluationLoader:
    """Batches of samples, as they are, in the order of a sampler."""

    batch_sampler = None
    """Lightning asks whatever has a sampler for this too."""

    def __init__(self, samples: Samples, sampler: EvaluationSampler) -> None:
        """Serve `samples`, to whose number the sampler counts."""
        self.samples = samples
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for positions in self.sampler:
            yield self.samples[positions]


class TrainingLoader:
    """Batches of samples, as training sees them in an epoch, in the order of a sampler.

    The loader remembers its place in the epoch: Lightning saves it with a checkpoint, and a run
    resumed in mid-epoch goes on with the very next batch.
    """

    batch_sampler = None
    """Lightning asks whatever has a sampler for this too."""

    def __init__(self, samples: Samples, sampler: TrainingSampler) -> None:
        """Serve `samples`, to whose number the sampler counts."""
        self.samples = samples
        self.sampler = sampler
        self._place = {"epoch": 0, "next_batch": 0}
        self._resume_at: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator: the epoch is read when the first batch is asked for. On a resumed run
        # Lightning makes the iterator before it sets the epoch.
        epoch = self.sampler.epoch
        first_batch = self._take_resumed_place(epoch)
        samples = self.samples.at_epoch(self.sampler.seed, epoch)
        for batch, positions in enumerate(self.sampler):
            if batch < first_batch:
                continue
            self._place = {"epoch": epoch, "next_batch": batch + 1}
            yield samples[positions]

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of the next batch and the size of a global batch."""
        return {**self._place, "global_batch_size": self.sampler.global_batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip, once, what was already served of the epoch in `state`."""
        self._resume_at = state

    def _take_resumed_place(self, epoch: int) -> int:
        """Return the first batch to serve in this pass over `epoch`."""
        state, self._resume_at = self._resume_at, None
        if state is None or state["epoch"] != epoch:
            return 0
        if state["global_batch_size"] != self.sampler.global_batch_size:
            raise InputError(
                f"data.batch_size={self.sampler.batch_size}: all processes together take "
                f"{self.sampler.global_batch_size} samples a step; to resume in mid-epoch it must "
                f"be {state['global_batch_size']}, as before"
            )
        return state["next_batch"]
