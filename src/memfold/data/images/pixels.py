"""Images that a user has, as pixels like those of a data set."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.decoded_files import decode
from memfold.errors import InputError

__all__ = ["Images", "pixels_of"]

Images = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor | Sequence["Images"]


def pixels_of(images: Any, data: ImageDataModule) -> Tensor:
    """Turn images into pixels.

    Args:
        images: Files or PIL images, which become what `data.layout` says: turned upright, converted
            to its channels, and resized where the files of the data set are; or pixels 0 to 255 of
            its height, width and channels, as uint8 NumPy arrays (H, W, C) or (B, H, W, C) or uint8
            tensors (C, H, W) or (B, C, H, W), grey ones without C too; or a sequence of all these.
        data: The data set.

    Returns:
        uint8 (B, C, H, W).

    Raises:
        InputError: An image has another type, size or number of channels.
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        return torch.from_numpy(np.array(decode(images, data.layout)[None]))
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
        "images must be files, PIL images, uint8 arrays or tensors with values 0 to 255 (not "
        f"normalised: that is done here), or a list of such, got {kind}"
    )


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
