"""Images that a user has, as pixels like those of a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.errors import InputError

__all__ = ["Images", "pixels_of"]

Images = Image.Image | NDArray[Any] | Tensor | Sequence["Images"]

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels -> what PIL calls such an image."""


def pixels_of(images: Any, data: ImageDataModule) -> Tensor:
    """Turn images into pixels.

    Args:
        images: Pixels 0 to 255: PIL images, uint8 NumPy arrays (H, W, C) or (B, H, W, C), uint8
            tensors (C, H, W) or (B, C, H, W), grey ones without C too, or a sequence of such.
            Height, width and channels are those of the data set.
        data: The data set.

    Returns:
        uint8 (B, C, H, W).

    Raises:
        InputError: An image has another type, size or number of channels.
    """
    if isinstance(images, Image.Image):
        return pixels_of(_of_mode(images, data), data)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        found = torch.from_numpy(np.array(images))  # a copy: it may be read-only
        return _shaped(found, "H, W, C", data).movedim(-1, 1)
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        return _shaped(images, "C, H, W", data)
    if isinstance(images, list | tuple) and images:
        return torch.cat([pixels_of(image, data) for image in images])
    is_empty = isinstance(images, list | tuple)
    kind = "none" if is_empty else getattr(images, "dtype", type(images).__name__)
    raise InputError(
        "images must be PIL images, uint8 arrays or tensors with values 0 to 255 (not "
        f"normalised: that is done here), or a list of such, got {kind}"
    )


def _of_mode(image: Image.Image, data: ImageDataModule) -> NDArray[Any]:
    mode = _MODES.get(data.num_channels)
    if image.mode != mode:
        raise InputError(
            f"the images of {data.name} have mode {mode}, got {image.mode}: image.convert({mode!r})"
        )
    return np.asarray(image)


def _shaped(pixels: Tensor, layout: str, data: ImageDataModule) -> Tensor:
    """Add what may be missing of the dimensions (B, *layout)."""
    channels, size = data.num_channels, data.image_size
    sizes = {"C": channels, "H": size, "W": size}
    expected = tuple(sizes[letter] for letter in layout.split(", "))
    fits = pixels.shape[-3:] == expected and pixels.ndim in (3, 4)
    is_grey = channels == 1 and pixels.shape[-2:] == (size, size) and pixels.ndim in (2, 3)
    if not fits and not is_grey:
        raise InputError(
            f"images of {data.name} must have shape {expected} ({layout}) or "
            f"(B, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}"
        )
    return pixels.reshape(-1, *expected)
