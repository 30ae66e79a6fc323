"""The data module that every image data set shares."""

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from memfold.data.batching import Chosen, Samples
from memfold.data.data_module import DataModule
from memfold.data.images.augmentation import TrainingImages, augment, normalise
from memfold.data.images.decoded_files import Layout
from memfold.data.images.image_set import ImageSet
from memfold.data.source_files import folder_of_sets
from memfold.data.spec import Classes, DataSpec, Images
from memfold.data.splits import split_training
from memfold.errors import InputError
from memfold.options import Count, Interval, Natural, check_arguments

__all__ = ["ImageDataModule"]

log = logging.getLogger(__name__)


class ImageDataModule(DataModule):
    """Splits and augments the images that a data set's class reads.

    A subclass sets the facts below and implements `load_train` and `load_test`, and
    `prepare_data` if it has files. The validation set comes out of the training set.

    After `on_after_batch_transfer`, which Lightning calls, a batch is `(images float32
    (B, C, H, W) normalised, labels int64 (B,))` on the model's device, augmented in training.
    """

    num_channels: int
    image_size: int
    """Height and width, in pixels."""

    num_classes: int
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...]
    """Of each channel over the training images, pixels scaled to 0..1."""

    std: tuple[float, ...]
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
        super().__init__(batch_size=batch_size, split_seed=split_seed, seed=seed)
        check_arguments(ImageDataModule.__init__, locals(), "data.")
        self.root = folder_of_sets(root)
        self.val_fraction = val_fraction
        self.crop_padding = crop_padding
        if hasattr(self, "image_size"):  # of folders it is not known yet
            self.check_padding()
        self.horizontal_flip = horizontal_flip
        self.train_subset = train_subset
        self.download = download
        self._statistics: Tensor | None = None

    @property
    def spec(self) -> DataSpec:
        """Images of the class's size, in its classes."""
        images = Images(self.num_channels, self.image_size, self.image_size)
        return DataSpec(images, Classes(self.num_classes, self.class_names))

    @property
    def layout(self) -> Layout:
        """What an image file becomes: images of other sizes are refused, unless a class resizes."""
        return Layout(self.image_size, self.num_channels)

    def check_padding(self) -> None:
        """Check `crop_padding` once the size is known.

        Raises:
            InputError: It is larger than the images.
        """
        if self.crop_padding > self.image_size:
            raise InputError(
                f"data.crop_padding={self.crop_padding} must be at most {self.image_size}, the "
                "images' size"
            )

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

    def read_train(self) -> tuple[Samples, Samples]:
        """Read the training file and part it.

        Raises:
            InputError: It cannot be read, or `data.val_fraction` or `data.train_subset` does not
                suit the number of samples.
        """
        images = self.load_train()
        self._note_size(0, len(images))
        train, val = split_training(
            images.labels,
            val_fraction=self.val_fraction,
            train_subset=self.train_subset,
            seed=self.split_seed,
        )
        return Chosen(TrainingImages(images, self.crop_padding), train), Chosen(images, val)

    def read_test(self) -> Samples:
        """Read the test file."""
        images = self.load_test()
        self._note_size(1, len(images))
        return images

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
        if self._statistics is None or self._statistics.device != images.device:
            # Moved once, not copied for every batch.
            self._statistics = torch.tensor([self.mean, self.std], device=images.device)
        return normalise(images, *self._statistics), labels

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
