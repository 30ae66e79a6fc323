"""The idx.gz format of MNIST and of the sets that follow it.

An idx file is gzip of: two zero bytes, the type (8 for unsigned bytes), the number of dimensions,
each dimension as a big-endian 32-bit integer, then the values, last dimension fastest.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.image_set import ImageSet, check_labels
from memfold.data.source_files import Remote, fetch, first_line
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["IdxDataModule", "read_idx"]

_UNSIGNED_BYTE = 0x08
_CHUNK = 2**20


def read_idx(path: Path, expected: Sequence[int | None]) -> Tensor:
    """Read an idx.gz file of unsigned bytes, and no more of it than its header says.

    Args:
        path: The file.
        expected: Its shape: (None, H, W) for any number of images, (N,) for their labels.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        InputError: The file cannot be read, is no such file, is truncated, or has another shape.
    """
    try:
        with open_regular(path) as file, gzip.open(file) as stream:
            shape = _read_shape(stream, path, expected)
            # One more, which is not there: a few bytes of gzip can stand for any number of zeros.
            wanted, content = math.prod(shape) + 1, bytearray()
            while chunk := stream.read(min(wanted - len(content), _CHUNK)):
                content += chunk
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{path}: {first_line(error)}; expected a complete gzip file; delete it to download "
            "it again"
        ) from error
    if len(content) != math.prod(shape):
        more = " or more" if len(content) > math.prod(shape) else ""
        raise InputError(
            f"{path}: {len(content)} values{more}, expected {_sizes(shape)} = "
            f"{math.prod(shape)} as its header says; delete it to download it again"
        )
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _read_shape(
    stream: gzip.GzipFile, path: Path, expected: Sequence[int | None]
) -> tuple[int, ...]:
    num_dims = len(expected)
    header_length = 4 + 4 * num_dims
    magic = bytes([0, 0, _UNSIGNED_BYTE, num_dims])
    header = stream.read(header_length)
    if header[:4] != magic:
        raise InputError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}, expected {magic.hex()} (idx, "
            f"unsigned bytes, {num_dims} dimension(s))"
        )
    if len(header) < header_length:
        raise InputError(f"{path}: {len(header)} bytes, expected a header of {header_length}")
    shape = struct.unpack(f">{num_dims}I", header[4:])
    if not shape[0] or any(
        size not in (None, found) for size, found in zip(expected, shape, strict=True)
    ):
        raise InputError(
            f"{path}: {_sizes(shape)} values, expected {_sizes(expected)}, and at least one; "
            "delete it to download it again"
        )
    return shape


def _sizes(shape: Sequence[int | None]) -> str:
    return " x ".join("N" if size is None else str(size) for size in shape)


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
        images = read_idx(images_path, (None, self.image_size, self.image_size))
        labels = read_idx(labels_path, (len(images),)).long()
        check_labels(labels, self.num_classes, labels_path)
        return ImageSet(images[:, None], labels)

    def _path(self, filename: str, *, download: bool) -> Path:
        remote = Remote(self.url + filename, f"md5:{self.checksums[filename]}")
        return fetch(self.root, self.name, remote, download=download)

    def _check_owner(self, labels_path: Path) -> None:
        """Refuse another set's files: straight in data.root, their names do not tell."""
        if labels_path.parent != self.root:
            return
        try:
            with open_regular(labels_path) as file:
                checksum = hashlib.file_digest(file, "md5").hexdigest()
        except OSError:
            return  # reading it will say so
        other = self.foreign_labels.get(checksum)
        if other is not None:
            raise InputError(
                f"data.root={self.root}: {labels_path.name} in it belongs to {other}, not to "
                f"{self.name}; put the files of {self.name} in {self.root / self.name}"
            )
