"""Predictions of a saved run for images as its data set has them."""

import os
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.errors import InputError
from memfold.training.load import load_model, read_data

__all__ = ["Images", "Predictor"]

Images = Image.Image | NDArray[Any] | Tensor | Sequence["Images"]

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels -> what PIL calls such an image."""


class Predictor:
    """The network of a run behind the normalisation of its data set.

    `network` is what `load_model` returns; moved to a GPU, it predicts there.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        weights: Literal["artifact", "last", "best"] = "artifact",
        *,
        allow: Collection[str] = (),
    ) -> None:
        """Load a run; its data set itself is not needed.

        Args:
            run_dir: A run folder.
            weights: See `load_model`.
            allow: See `load_model`.

        Raises:
            InputError: As `load_model` does.
        """
        _, data = read_data(run_dir, allow=allow)
        if not isinstance(data, ImageDataModule):
            raise InputError(f"{run_dir}: Predictor takes images, and data={data.name} has none")
        self._data = data
        self.network = load_model(run_dir, weights, allow=allow)

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Classify images.

        Args:
            images: See `prepare`.

        Returns:
            Logits (B, classes), float32 on the device of `network`; B is 1 for a single image.

        Raises:
            InputError: As `prepare` does.
        """
        device = next(self.network.parameters()).device
        return self.network(self.prepare(images, device))

    def prepare(self, images: Images, device: torch.device | None = None) -> Tensor:
        """Turn images into what the network takes: those of a test batch, bit for bit.

        Args:
            images: Pixels 0 to 255: PIL images, uint8 NumPy arrays (H, W, C) or (B, H, W, C),
                uint8 tensors (C, H, W) or (B, C, H, W), grey ones without C too, or a sequence
                of such. Height, width and channels are those of the data set.
            device: Where to normalise them; where they are if `None`.

        Returns:
            (B, C, H, W), float32, normalised as the run's data module does it.

        Raises:
            InputError: An image has another type, size or number of channels.
        """
        pixels = self._pixels(images)
        labels = torch.empty(len(pixels), dtype=torch.int64)
        return self._data.on_after_batch_transfer((pixels.to(device), labels))[0]

    def _pixels(self, images: Images) -> Tensor:
        """Return uint8 (B, C, H, W)."""
        if isinstance(images, Image.Image):
            return self._pixels(self._of_mode(images))
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            found = torch.from_numpy(np.array(images))  # a copy: it may be read-only
            return self._shaped(found, "H, W, C").movedim(-1, 1)
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            return self._shaped(images, "C, H, W")
        if isinstance(images, list | tuple) and images:
            return torch.cat([self._pixels(image) for image in images])
        is_empty = isinstance(images, list | tuple)
        kind = "none" if is_empty else getattr(images, "dtype", type(images).__name__)
        raise InputError(
            "images must be PIL images, uint8 arrays or tensors with values 0 to 255 (not "
            f"normalised: that is done here), or a list of such, got {kind}"
        )

    def _of_mode(self, image: Image.Image) -> NDArray[Any]:
        mode = _MODES.get(self._data.num_channels)
        if image.mode != mode:
            raise InputError(
                f"the images of {self._data.name} have mode {mode}, got {image.mode}: "
                f"image.convert({mode!r})"
            )
        return np.asarray(image)

    def _shaped(self, pixels: Tensor, layout: str) -> Tensor:
        """Add what may be missing of the dimensions (B, *layout)."""
        channels, size = self._data.num_channels, self._data.image_size
        sizes = {"C": channels, "H": size, "W": size}
        expected = tuple(sizes[letter] for letter in layout.split(", "))
        fits = pixels.shape[-3:] == expected and pixels.ndim in (3, 4)
        is_grey = channels == 1 and pixels.shape[-2:] == (size, size) and pixels.ndim in (2, 3)
        if not fits and not is_grey:
            raise InputError(
                f"images of {self._data.name} must have shape {expected} ({layout}) or "
                f"(B, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}"
            )
        return pixels.reshape(-1, *expected)
