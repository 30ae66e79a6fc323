"""Image files, decoded; folders of them once, into a memory-mapped cache.

The cache of a list of files is a folder whose name holds a fingerprint of that list: every
resolved path, size, times of change and label. A folder that has moved is decoded again.
The cache is made under another name and renamed when complete, so one that exists under its name is
whole, and one of files that have changed since is not found.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from memfold.data.images.image_set import ImageSet
from memfold.data.source_files import first_line, move_into_place, new_folder
from memfold.errors import InputError
from memfold.files import open_regular

__all__ = ["FORMATS", "ImageFile", "Layout", "UnusableFiles", "cached_images", "decode"]

log = logging.getLogger(__name__)

_LAYOUT = "memfold-3"
"""Part of the fingerprint: to be changed with what the cache holds."""

_NUM_FILES_AT_A_TIME = 1024
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels -> what Pillow calls such an image."""


class UnusableFiles(InputError):
    """Files cannot be decoded, or have another size."""


@dataclass(frozen=True)
class ImageFile:
    """An encoded image and its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Layout:
    """What every image becomes."""

    size: int
    """Height and width, in pixels."""
    channels: int = 3
    is_resized: bool = False
    """Whether an image of another size is scaled, its shorter side to `size`, and cropped in the
    middle; else it is refused."""


def cached_images(
    files: Sequence[ImageFile], layout: Layout, parent: Path, *, skips_damaged: bool = False
) -> tuple[ImageSet, Sequence[ImageFile]]:
    """Return the decoded files, from the cache in `parent` or, the first time, by decoding.

    Args:
        files: In the order in which their images are returned.
        layout: What they become.
        parent: Folder of the cache.
        skips_damaged: Whether to leave out what cannot be decoded, and say how many.

    Returns:
        Images (N, C, H, W), memory-mapped (writing to them changes no file), and labels; and the
        N files that they are of.

    Raises:
        UnusableFiles: A file cannot be decoded or has another size.
        InputError: The cache cannot be written.
    """
    cache = parent / f"decoded-{_fingerprint(files, layout)}"
    expected_shape = (len(files), layout.channels, layout.size, layout.size)
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    images = _open_cache(cache, expected_shape)
    if images is None:
        shutil.rmtree(cache, ignore_errors=True)
        _decode_all(files, layout, parent, cache, expected_shape)
        images = _open_cache(cache, expected_shape)
        assert images is not None
    damaged = _damaged(cache, len(files))
    if not damaged:
        return ImageSet(images, labels), files
    reason = _why_damaged(files[damaged[0]].path, layout)
    if len(damaged) > 1:
        reason += f"; {len(damaged) - 1} more of {len(files)} files cannot be used"
    if not skips_damaged:
        raise UnusableFiles(reason)
    log.warning("left out: %s", reason)
    kept = torch.ones(len(files), dtype=torch.bool)
    kept[damaged] = False
    kept_files = [files[number] for number in kept.nonzero().flatten().tolist()]
    return ImageSet(images[kept], labels[kept]), kept_files


def _decode_all(
    files: Sequence[ImageFile], layout: Layout, parent: Path, cache: Path, shape: tuple[int, ...]
) -> None:
    """Decode into a new cache, with a list of the files that cannot be."""
    damaged: list[int] = []
    with new_folder(parent) as unfinished:
        images = np.lib.format.open_memmap(
            unfinished / "images.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="decoding images") as bar:
            for start in range(0, len(files), _NUM_FILES_AT_A_TIME):
                some = files[start : start + _NUM_FILES_AT_A_TIME]
                decoded = pool.map(lambda file: _decoded_or_none(file.path, layout), some)
                for number, image in enumerate(decoded, start):
                    if image is None:
                        damaged.append(number)
                    else:
                        images[number] = image
                bar.update(len(some))
        images.flush()
        np.save(unfinished / "damaged.npy", np.array(damaged, dtype=np.int64))
        move_into_place(unfinished, cache)


def _why_damaged(path: Path, layout: Layout) -> str:
    try:
        decode(path, layout)
    except InputError as error:
        return str(error)
    return f"{path}: could not be decoded before, and can be now; touch it"


def _decoded_or_none(path: Path, layout: Layout) -> np.ndarray | None:
    try:
        return decode(path, layout)
    except InputError:
        return None


def _damaged(cache: Path, num_files: int) -> list[int]:
    """Return the numbers of the files that could not be decoded."""
    try:
        found = np.load(cache / "damaged.npy", allow_pickle=False).tolist()
    except (OSError, ValueError, EOFError):
        return []
    return [number for number in found if 0 <= number < num_files]


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


def _fingerprint(files: Sequence[ImageFile], layout: Layout) -> str:
    """Hash the paths, sizes, times of change and labels of the files.

    A copy may have the time of its original; when the system last changed it, nobody can set.
    """
    digest = hashlib.blake2b(f"{_LAYOUT} {layout}".encode(), digest_size=8)
    parents: dict[Path, str] = {}  # a folder of many files is resolved once
    for file in files:
        try:
            status = os.stat(file.path)
            state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
        except FileNotFoundError:  # a broken link: damaged, as others may be
            state = "missing"
        except (OSError, ValueError) as error:  # NUL in a name
            raise InputError(f"{file.path}: {first_line(error)}; expected an image") from error
        if file.path.parent not in parents:
            parents[file.path.parent] = os.path.realpath(file.path.parent)
        fact = f"\0{parents[file.path.parent]}\0{file.path.name}\0{state}\0{file.label}"
        digest.update(os.fsencode(fact))
    return digest.hexdigest()


def decode(source: str | os.PathLike[str] | Image.Image, layout: Layout) -> np.ndarray:
    """Return an image as (C, H, W) uint8, upright; of a grey one, three channels are equal.

    Args:
        source: A file, or what Pillow has opened or made.
        layout: What it becomes.

    Raises:
        InputError: It cannot be decoded, has another size and is not to be resized, or levels
            whose range nobody knows.
    """
    try:
        if isinstance(source, Image.Image):
            return _laid_out(source, layout)
        # Some of Pillow's other formats start programs.
        with open_regular(source) as file, Image.open(file, formats=FORMATS) as opened:
            return _laid_out(opened, layout)
    except Exception as error:  # Pillow's plug-ins report damage by any of them
        name = "image" if isinstance(source, Image.Image) else source
        if isinstance(error, InputError):
            raise InputError(f"{name}: {error}") from error
        raise InputError(f"{name}: {first_line(error)}; expected a complete image") from error


def _laid_out(opened: Image.Image, layout: Layout) -> np.ndarray:
    size = layout.size
    # Before any pixel is decoded.
    if opened.size != (size, size) and not layout.is_resized:
        raise InputError(f"{opened.height} x {opened.width} pixels, expected {size} x {size}")
    if opened.mode in ("I", "F") and opened.format not in FORMATS:
        raise InputError(f"mode {opened.mode} has levels without a known highest; give uint8")
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    image = upright.convert(_MODES[layout.channels])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, layout.channels).transpose(2, 0, 1)
