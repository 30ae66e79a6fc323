"""The data module that every image data set shares."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from memfold.data.batching import (
    EvaluationLoader,
    EvaluationSampler,
    TrainingLoader,
    TrainingSampler,
    augment,
    normalise,
)
from memfold.data.image_set import ImageSet
from memfold.data.splits import stratified_order
from memfold.errors import InputError
from memfold.options import Count, Interval, Natural, check_arguments
from memfold.seeding import derive_seed

__all__ = ["ImageDataModule"]

log = logging.getLogger(__name__)

_SCORING_BATCH_SIZE = 128


class ImageDataModule(pl.LightningDataModule, ABC):
    """Splits, batches and augments the images that a data set's class reads.

    A subclass sets the facts below and implements `load_train` and `load_test`, and
    `prepare_data` if it has files. The validation set comes out of the training set; the test
    set is read in the test stage alone.

    After `on_after_batch_transfer`, which Lightning calls, a batch is `(images float32
    (B, C, H, W) normalised, labels int64 (B,))` on the model's device, augmented in training.
    """

    name: ClassVar[str]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Name in `conf/data`, and of the folder in `data.root`."""

    num_channels: ClassVar[int]
    image_size: ClassVar[int]
    """Height and width, in pixels."""

    num_classes: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    """Of each channel over the training images, pixels scaled to 0..1."""

    std: ClassVar[tuple[float, ...]]
    published_sizes: ClassVar[tuple[int, int] | None] = None
    """Images in the training and the test set as published, if it is."""

    def __init__(
        self,
        *,
        root: str | Path = "data",
        batch_size: Count = 128,
        val_fraction: Annotated[float, Interval("(0, 1)")] = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        crop_padding: Natural = 0,
        horizontal_flip: bool = False,
        train_subset: Count | None = None,
        download: bool = True,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            root: Folder of data sets.
            batch_size: Samples per batch and process.
            val_fraction: Share of the training set that becomes the validation set, in (0, 1).
            split_seed: Of the validation split and of `train_subset`.
            seed: Of the order and the augmentation of the training samples.
            crop_padding: Pixels of zeros around an image before it is cropped at random; 0 for
                no crop.
            horizontal_flip: Whether to flip half of the images, drawn anew every epoch.
            train_subset: Train on this many samples only, a stratified choice of what the
                validation split leaves; null for all.
            download: Whether missing files may be downloaded.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__()
        check_arguments(ImageDataModule.__init__, locals(), "data.")
        if not str(root):
            raise InputError("data.root must be a folder (or set MEMFOLD_DATA), got nothing")
        if crop_padding > self.image_size:
            raise InputError(
                f"data.crop_padding={crop_padding} must be at most {self.image_size}, the images'"
            )
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.train_subset = train_subset
        self.download = download
        self._train_file: ImageSet | None = None
        self._test_file: ImageSet | None = None
        self._train_samples = torch.empty(0, dtype=torch.int64)
        self._val_samples = torch.empty(0, dtype=torch.int64)
        self._train_loader: TrainingLoader | None = None
        self._resume_at: dict[str, Any] | None = None
        self._mean = torch.tensor(self.mean)
        self._std = torch.tensor(self.std)

    @abstractmethod
    def load_train(self) -> ImageSet:
        """Read the published training set, in the order of its files.

        Raises:
            InputError: A file is missing, truncated or damaged.
        """

    @abstractmethod
    def load_test(self) -> ImageSet:
        """Read the published test set, in the order of its files.

        Raises:
            InputError: A file is missing, truncated or damaged.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs: "fit" and "validate" the training file, "test" the test file.

        Raises:
            InputError: Files cannot be read, or `data.val_fraction` or `data.train_subset` does
                not suit the number of samples.
        """
        if stage in ("fit", "validate", None) and self._train_file is None:
            self._train_file = self.load_train()
            self._note_size(0, len(self._train_file))
            self._split(self._train_file.labels)
        if stage in ("test", None) and self._test_file is None:
            self._test_file = self.load_test()
            self._note_size(1, len(self._test_file))

    @property
    def train_samples(self) -> Tensor:
        """(N,) int64 numbers, in the training file, of the samples to train on."""
        return self._train_samples

    @property
    def val_samples(self) -> Tensor:
        """(N,) int64 numbers, in the training file, of the validation samples."""
        return self._val_samples

    def train_dataloader(self) -> TrainingLoader:
        """Return this process's share of the shuffled training batches.

        Raises:
            InputError: A global batch would hold more than the training set, or the Trainer is
                to overfit: it would see other batches in every epoch.
        """
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            raise InputError(
                f"trainer.overfit_batches={overfit_batches}: must be 0; to overfit a few samples "
                "set data.train_subset to their number"
            )
        rank, world_size = self._place_among_processes()
        sampler = TrainingSampler(
            len(self._train_samples),
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        self._train_loader = TrainingLoader(
            _loaded(self._train_file, "fit"),
            self._train_samples,
            sampler,
            crop_padding=self.crop_padding,
        )
        if self._resume_at is not None:
            self._train_loader.load_state_dict(self._resume_at)
            self._resume_at = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training set, for a checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on from the place in a checkpoint.

        Lightning tells the loader itself, but too late where a task has asked for the number of
        steps before the checkpoint is restored.
        """
        self._resume_at = state_dict

    def val_dataloader(self) -> EvaluationLoader:
        """Return this process's share of the validation set."""
        return self._evaluation_loader(_loaded(self._train_file, "fit"), self._val_samples)

    def test_dataloader(self) -> EvaluationLoader:
        """Return this process's share of the test set."""
        test_file = _loaded(self._test_file, "test")
        return self._evaluation_loader(test_file, torch.arange(len(test_file)))

    def scoring_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training set once, normalised but not augmented, in a random order.

        The same on every rank, whatever the batch size of training: what is scored on these
        batches does not depend on the number of processes. Files are prepared when they have to be.

        Args:
            seed: Of the order.
        """
        if self._train_file is None:
            self.prepare_data()
            self.setup("fit")
        generator = torch.Generator().manual_seed(derive_seed(seed, "scoring-batches"))
        order = torch.randperm(len(self._train_samples), generator=generator)
        samples = self._train_samples[order]
        sampler = EvaluationSampler(len(samples), _SCORING_BATCH_SIZE, rank=0, world_size=1)
        for batch in EvaluationLoader(_loaded(self._train_file, "fit"), samples, sampler):
            yield self.on_after_batch_transfer(batch)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, ...], dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Augment, when the batch is one of training, and normalise, on the batch's device."""
        images, labels, *draws = batch
        if draws and (self.crop_padding or self.horizontal_flip):
            images = augment(
                images,
                draws[0],
                crop_padding=self.crop_padding,
                horizontal_flip=self.horizontal_flip,
            )
        if self._mean.device != images.device:  # moved once, not copied for every batch
            self._mean = self._mean.to(images.device)
            self._std = self._std.to(images.device)
        return normalise(images, self._mean, self._std), labels

    def _note_size(self, part: int, found: int) -> None:
        # A file cut between two records is whole by its format: only the count can tell.
        if self.published_sizes is not None and found != self.published_sizes[part]:
            log.warning(
                "data=%s: the %s set in %s has %d images, as published it has %d",
                self.name,
                ("training", "test")[part],
                self.root,
                found,
                self.published_sizes[part],
            )

    def _split(self, labels: Tensor) -> None:
        """Choose the validation samples and, of the others, the training samples."""
        seed = derive_seed(self.split_seed, "validation")
        order = stratified_order(labels, seed)
        num_val = round(self.val_fraction * len(labels))
        if not 0 < num_val < len(labels):
            raise InputError(
                f"data.val_fraction={self.val_fraction}: leaves {num_val} of {len(labels)} samples "
                "for validation; both parts need at least one"
            )
        self._val_samples = order[:num_val].sort().values
        rest = order[num_val:].sort().values
        if self.train_subset is not None:
            if self.train_subset > len(rest):
                raise InputError(
                    f"data.train_subset={self.train_subset}: must be at most {len(rest)}, what "
                    "the validation split leaves"
                )
            seed = derive_seed(self.split_seed, "subset")
            rest = rest[stratified_order(labels[rest], seed)[: self.train_subset]].sort().values
        self._train_samples = rest

    def _evaluation_loader(self, data: ImageSet, samples: Tensor) -> EvaluationLoader:
        rank, world_size = self._place_among_processes()
        sampler = EvaluationSampler(len(samples), self.batch_size, rank=rank, world_size=world_size)
        return EvaluationLoader(data, samples, sampler)

    def _place_among_processes(self) -> tuple[int, int]:
        """Return (rank, number of processes); (0, 1) outside a Trainer."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _loaded(data: ImageSet | None, stage: str) -> ImageSet:
    if data is None:
        raise RuntimeError(f"call setup({stage!r}) before asking for this data loader")
    return data
