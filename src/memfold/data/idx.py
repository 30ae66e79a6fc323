"""The idx.gz format of MNIST and of the sets that follow it.

An idx file is gzip of: two zero bytes, the type (8 for unsigned bytes), the number of dimensions,
each dimension as a big-endian 32-bit integer, then the values, last dimension fastest.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import ClassVar

import pooch
import torch
from torch import Tensor

from memfold.data.base import ImageDataModule
from memfold.data.files import Remote, fetch, first_line
from memfold.data.image_set import ImageSet, check_labels
from memfold.errors import InputError

__all__ = ["IdxDataModule", "read_idx"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read an idx.gz file of unsigned bytes.

    Args:
        path: The file.
        num_dims: Dimensions expected: 3 for images (N, H, W), 1 for labels (N,).

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        InputError: The file cannot be read, is no such file, or is truncated.
    """
    try:
        with gzip.open(path) as stream:
            content = bytearray(stream.read())
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{path}: {first_line(error)}; expected a complete gzip file; delete it to download "
            "it again"
        ) from error
    header_length = 4 + 4 * num_dims
    magic = bytes([0, 0, _UNSIGNED_BYTE, num_dims])
    if content[:4] != magic:
        raise InputError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, expected {magic.hex()} (idx, "
            f"unsigned bytes, {num_dims} dimension(s))"
        )
    if len(content) < header_length:
        raise InputError(f"{path}: {len(content)} bytes, expected a header of {header_length}")
    shape = struct.unpack(f">{num_dims}I", content[4:header_length])
    if len(content) - header_length != math.prod(shape) or not math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise InputError(
            f"{path}: {len(content) - header_length} values, expected {sizes} = "
            f"{math.prod(shape)} as its header says, and at least one; delete it to download it "
            "again"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=header_length).view(shape)


class IdxDataModule(ImageDataModule):
    """A data set of four idx.gz files under the names that MNIST gave them."""

    url: ClassVar[str]
    """Folder of the published files, with a closing slash."""

    checksums: ClassVar[dict[str, str]]
    """MD5 of each published file, by its name."""

    foreign_labels: ClassVar[dict[str, str]]
    """MD5 of label files that another set publishes under the same name, and that set's name."""

    def prepare_data(self) -> None:
        """Download what is missing."""
        for filename in self.checksums:
            self._path(filename, download=self.download)

    def load_train(self) -> ImageSet:
        """Read the training files."""
        return self._read("train")

    def load_test(self) -> ImageSet:
        """Read the test files."""
        return self._read("t10k")

    def _read(self, prefix: str) -> ImageSet:
        images_path = self._path(f"{prefix}-images-idx3-ubyte.gz", download=False)
        labels_path = self._path(f"{prefix}-labels-idx1-ubyte.gz", download=False)
        self._check_owner(labels_path)
        images = read_idx(images_path, num_dims=3)
        labels = read_idx(labels_path, num_dims=1).long()
        if images.shape[1:] != (self.image_size, self.image_size):
            raise InputError(
                f"{images_path}: images of {images.shape[1]} x {images.shape[2]} pixels, expected "
                f"{self.image_size} x {self.image_size}"
            )
        if len(labels) != len(images):
            raise InputError(
                f"{labels_path}: {len(labels)} labels, expected {len(images)}, one for each image "
                f"of {images_path.name}"
            )
        check_labels(labels, self.num_classes, labels_path)
        return ImageSet(images[:, None], labels)

    def _path(self, filename: str, *, download: bool) -> Path:
        remote = Remote(self.url + filename, f"md5:{self.checksums[filename]}")
        return fetch(self.root, self.name, remote, download=download)

    def _check_owner(self, labels_path: Path) -> None:
        """Refuse another set's files: straight in data.root, their names do not tell."""
        if labels_path.parent != self.root:
            return
        other = self.foreign_labels.get(pooch.file_hash(str(labels_path), alg="md5"))
        if other is not None:
            raise InputError(
                f"data.root={self.root}: {labels_path.name} in it belongs to {other}, not to "
                f"{self.name}; put the files of {self.name} in {self.root / self.name}"
            )
