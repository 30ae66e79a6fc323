"""Folders of image files, decoded once into a memory-mapped cache.

The cache of a list of files is a folder whose name holds a fingerprint of that list: every
path, size and time of change. It is made under another name and renamed when complete, so a
cache that exists under its name is whole, and one of files that have changed since is not found.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from memfold.data.image_set import ImageSet
from memfold.data.source_files import first_line, move_into_place, new_folder
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["ImageFile", "cached_images"]

_LAYOUT = "memfold-1"
"""Part of the fingerprint: to be changed with what the cache holds."""

_NUM_FILES_AT_A_TIME = 1024
_FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class ImageFile:
    """An encoded image and its class."""

    path: Path
    label: int


def cached_images(files: Sequence[ImageFile], image_size: int, parent: Path) -> ImageSet:
    """Return the decoded files, from the cache in `parent` or, the first time, by decoding.

    Args:
        files: In the order in which their images are returned.
        image_size: Height and width that every image must have, in pixels.
        parent: Folder of the cache.

    Returns:
        RGB images (N, 3, H, W), memory-mapped (writing to them changes no file), and labels.

    Raises:
        InputError: A file cannot be decoded or has another size.
    """
    cache = parent / f"decoded-{_fingerprint(files, image_size)}"
    expected_shape = (len(files), 3, image_size, image_size)
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    if (found := _open_cache(cache, expected_shape)) is not None:
        return ImageSet(found, labels)
    shutil.rmtree(cache, ignore_errors=True)
    with new_folder(parent) as unfinished:
        images = np.lib.format.open_memmap(
            unfinished / "images.npy", mode="w+", dtype=np.uint8, shape=expected_shape
        )
        with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="decoding images") as bar:
            for start in range(0, len(files), _NUM_FILES_AT_A_TIME):
                some = files[start : start + _NUM_FILES_AT_A_TIME]
                decoded = pool.map(lambda file: _decode(file.path, image_size), some)
                for number, image in enumerate(decoded, start):
                    images[number] = image
                bar.update(len(some))
        images.flush()
        move_into_place(unfinished, cache)
    found = _open_cache(cache, expected_shape)
    assert found is not None
    return ImageSet(found, labels)


def _open_cache(cache: Path, expected_shape: tuple[int, ...]) -> torch.Tensor | None:
    """Map the images of a cache; None when there is none, or someone has cut it short."""
    file = cache / "images.npy"
    try:
        # Copy-on-write: torch wants writable memory, the file must stay as it is.
        images = np.load(file, mmap_mode="c", allow_pickle=False) if file.is_file() else None
    except (OSError, ValueError, EOFError):
        return None
    if images is None or (images.shape, images.dtype) != (expected_shape, np.uint8):
        return None
    return torch.from_numpy(images)


def _fingerprint(files: Sequence[ImageFile], image_size: int) -> str:
    """Hash the names, sizes, times of change and labels of the files."""
    digest = hashlib.blake2b(f"{_LAYOUT} {image_size}".encode(), digest_size=8)
    for file in files:
        try:
            status = os.stat(file.path)
        except (OSError, ValueError) as error:  # NUL in a name
            raise InputError(f"{file.path}: {first_line(error)}; expected an image") from error
        fact = f"\0{file.path.name}\0{status.st_size}\0{status.st_mtime_ns}\0{file.label}"
        digest.update(os.fsencode(fact))
    return digest.hexdigest()


def _decode(path: Path, image_size: int) -> np.ndarray:
    """Return the image as (3, H, W) uint8; a grey image has three equal channels."""
    try:
        # Some of Pillow's other formats start programs.
        with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
            if image.size != (image_size, image_size):  # before any pixel is decoded
                raise InputError(
                    f"{path}: {image.height} x {image.width} pixels, expected {image_size} x "
                    f"{image_size}"
                )
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except InputError:
        raise
    except Exception as error:  # Pillow's plug-ins report damage by any of them
        raise InputError(f"{path}: {first_line(error)}; expected a complete image") from error
