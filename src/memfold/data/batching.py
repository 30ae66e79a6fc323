"""The order in which samples are seen, and what happens to a batch on the model's device.

Everything random is a function of (seed, epoch, sample): neither the number of processes, nor the
batch size, nor an interruption changes which crop a sample gets, and the processes of a run share
every global batch without overlap.

The loaders here stand in for torch's DataLoader. With whole data sets in memory a batch is one
indexing operation, so worker processes have nothing to do; and Lightning leaves a loader that is
no DataLoader alone, where it would replace the sampler of a DataLoader by one of its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from memfold.data.image_set import ImageSet
from memfold.errors import InputError
from memfold.seeding import derive_seed

__all__ = [
    "EvaluationLoader",
    "EvaluationSampler",
    "TrainingLoader",
    "TrainingSampler",
    "augment",
    "draw_augmentations",
    "normalise",
]


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
    """Batches (images uint8 (B, C, H, W), labels int64 (B,)) in the order of a sampler."""

    batch_sampler = None
    """Lightning asks whatever has a sampler for this too."""

    def __init__(self, data: ImageSet, samples: Tensor, sampler: EvaluationSampler) -> None:
        """Serve the samples numbered `samples` (M,) of `data`; the sampler counts to M."""
        self.data = data
        self.samples = samples
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for positions in self.sampler:
            chosen = self.samples[positions]
            # index_select copies whole images: a third of the time of indexing by a tensor.
            yield self.data.images.index_select(0, chosen), self.data.labels[chosen]


class TrainingLoader:
    """Batches (images uint8 (B, C, H, W), labels int64 (B,), draws uint8 (B, 3)).

    The draws are those of `draw_augmentations`, for `augment` to apply on the model's device.

    The loader remembers its place in the epoch: Lightning saves it with a checkpoint, and a run
    resumed in mid-epoch goes on with the very next batch.
    """

    batch_sampler = None
    """Lightning asks whatever has a sampler for this too."""

    def __init__(
        self, data: ImageSet, samples: Tensor, sampler: TrainingSampler, *, crop_padding: int
    ) -> None:
        """Serve the samples numbered `samples` (M,) of `data`; the sampler counts to M."""
        self.data = data
        self.samples = samples
        self.sampler = sampler
        self.crop_padding = crop_padding
        self._place = {"epoch": 0, "next_batch": 0}
        self._resume_at: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # A generator: the epoch is read when the first batch is asked for. On a resumed run
        # Lightning makes the iterator before it sets the epoch.
        epoch = self.sampler.epoch
        first_batch = self._take_resumed_place(epoch)
        draws = draw_augmentations(
            len(self.data), self.crop_padding, seed=self.sampler.seed, epoch=epoch
        )
        for batch, positions in enumerate(self.sampler):
            if batch < first_batch:
                continue
            self._place = {"epoch": epoch, "next_batch": batch + 1}
            chosen = self.samples[positions]
            images = self.data.images.index_select(0, chosen)
            yield images, self.data.labels[chosen], draws[chosen]

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


def draw_augmentations(num_samples: int, crop_padding: int, *, seed: int, epoch: int) -> Tensor:
    """Draw the augmentation of every sample for one epoch.

    Args:
        num_samples: Size of the whole training file, so that a split moves no sample's draws.
        crop_padding: Pixels of padding on each side, at most 127.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        (num_samples, 3) uint8: row offset and column offset in 0..2 * crop_padding, and 1 to
        flip or 0.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "augment", epoch))
    limits = (2 * crop_padding + 1, 2 * crop_padding + 1, 2)
    columns = [
        torch.randint(limit, (num_samples,), generator=generator, dtype=torch.uint8)
        for limit in limits
    ]
    return torch.stack(columns, dim=1)


def augment(images: Tensor, draws: Tensor, *, crop_padding: int, horizontal_flip: bool) -> Tensor:
    """Crop each image at its own offset out of its padded self, and flip it if drawn.

    The padding is pixel value 0, black, put on before normalisation as in torchvision's
    RandomCrop followed by Normalize.

    Args:
        images: (B, C, H, W), any dtype.
        draws: (B, 3) of `draw_augmentations`, on the same device.
        crop_padding: As the draws were made with.
        horizontal_flip: False ignores the third draw.

    Returns:
        A new tensor like `images`.
    """
    num_images, num_channels, height, width = images.shape
    padded = F.pad(images, (crop_padding,) * 4)
    row_offsets, column_offsets, flips = draws.long().unbind(dim=1)
    rows = row_offsets[:, None] + torch.arange(height, device=images.device)
    columns = column_offsets[:, None] + torch.arange(width, device=images.device)
    if horizontal_flip:
        columns = torch.where(flips[:, None] == 1, columns.flip(1), columns)
    # One gather over flattened pixels: on a CPU it takes a third of the time of indexing by
    # rows and columns, and two thirds of that of indexing an unfolded view.
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)
    pixels = pixels[:, None, :].expand(-1, num_channels, -1)
    return padded.flatten(2).gather(2, pixels).view(num_images, num_channels, height, width)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale uint8 images (B, C, H, W) to float32 in 0..1, then to `mean` and `std` (C,)."""
    scale = 1 / (255 * std)
    shift = -mean / std
    return images.float().mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1))
