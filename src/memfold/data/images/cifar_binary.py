"""The binary version of CIFAR (Krizhevsky 2009), which needs no unpickling.

A file is a row of records: one label byte (two in CIFAR-100: coarse, then fine), then 3,072
bytes, the red, green and blue planes of a 32x32 image, row by row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.image_set import ImageSet, check_labels
from memfold.data.source_files import Remote, fetch, find, first_line, unpack, writable_folder
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["CifarDataModule", "read_cifar"]

_NUM_PIXEL_BYTES = 3 * 32 * 32
_MAX_BYTES = 2**30  # seven times the largest file


def read_cifar(path: Path, num_label_bytes: int) -> tuple[Tensor, Tensor]:
    """Read one binary file.

    Args:
        path: The file.
        num_label_bytes: Bytes before the pixels of a record; the last of them is the class.

    Returns:
        Images (N, 3, 32, 32) uint8, and labels (N,) int64.

    Raises:
        InputError: The file cannot be read, or is not a whole number of records.
    """
    try:
        with open_regular(path) as file:
            content = bytearray(file.read(_MAX_BYTES))
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}; expected a CIFAR binary file") from error
    record_length = num_label_bytes + _NUM_PIXEL_BYTES
    if not content or len(content) % record_length:
        raise InputError(
            f"{path}: {len(content)} bytes, expected a positive multiple of {record_length}, one "
            "record; delete the folder to unpack it again"
        )
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, record_length)
    images = records[:, num_label_bytes:].reshape(-1, 3, 32, 32)
    return images, records[:, num_label_bytes - 1].long()


class CifarDataModule(ImageDataModule):
    """A folder of binary files, or the published .tar.gz that holds it."""

    num_channels = 3
    image_size = 32
    folder: ClassVar[str]
    remote: ClassVar[Remote]
    train_files: ClassVar[Sequence[str]]
    """All of one length."""

    test_file: ClassVar[str]
    num_label_bytes: ClassVar[int]

    def prepare_data(self) -> None:
        """Download and unpack the archive, unless the folder is there."""
        if find(self.root, self.name, self.folder) is None:
            archive = fetch(self.root, self.name, self.remote, download=self.download)
            unpack(archive, self.folder, writable_folder(self.root, self.name))
        for filename in (*self.train_files, self.test_file):
            self._path(filename)

    def load_train(self) -> ImageSet:
        """Read and join the training files."""
        return self._read(self.train_files)

    def load_test(self) -> ImageSet:
        """Read the test file."""
        return self._read([self.test_file])

    def _read(self, filenames: Sequence[str]) -> ImageSet:
        parts = []
        for filename in filenames:
            path = self._path(filename)
            images, labels = read_cifar(path, self.num_label_bytes)
            check_labels(labels, self.num_classes, path)
            if parts and len(labels) != len(parts[0][1]):
                raise InputError(
                    f"{path}: {len(labels)} records, expected {len(parts[0][1])}, as many as "
                    f"{filenames[0]} has; delete the folder to unpack it again"
                )
            parts.append((images, labels))
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return ImageSet(images, labels)

    def _path(self, filename: str) -> Path:
        folder = find(self.root, self.name, self.folder)
        if folder is None:
            raise InputError(
                f"data.root={self.root}: no {self.folder} in {self.root / self.name} or "
                f"{self.root}; set data.root or MEMFOLD_DATA to a folder that has it (it comes "
                f"from {self.remote.url})"
            )
        if not (folder / filename).is_file():
            raise InputError(
                f"data.root={self.root}: {folder} has no {filename}; delete the folder to unpack "
                f"or download it again (from {self.remote.url})"
            )
        return folder / filename
