"""VGG-11 with BatchNorm for small images.

Simonyan & Zisserman (2015), configuration A, with a single linear layer after global average
pooling, as used in the pruning literature on CIFAR (open_lth, SynFlow, STABLE-RPS).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive, check_widths, initialise

__all__ = ["VGG11BN"]

_POOL = 0
_PLAN = (1, _POOL, 2, _POOL, 4, 4, _POOL, 8, 8, _POOL, 8, 8)
"""Channels of each convolution as a multiple of the width, and where to pool."""


class VGG11BN(nn.Module):
    """8 convolutions (with biases) and one linear layer: 9,231,114 parameters for CIFAR-10."""

    widths: tuple[int, ...]
    """Channels of each convolution."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 64,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; a map of one pixel is not
                pooled again.
            num_classes: Outputs.
            width: Channels of the first convolution; the last have 8 times as many.
            widths: Channels of each of the 8 convolutions instead.

        Raises:
            InputError: A width is not an integer of at least 1, or there are not 8 `widths`.
        """
        super().__init__()
        check_positive("width", width)
        factors = [factor for factor in _PLAN if factor != _POOL]
        if widths is None:
            widths = [factor * width for factor in factors]
        self.widths = check_widths("widths", widths, len(factors))
        self._facts = (in_channels, image_size, num_classes)
        remaining = iter(self.widths)
        self.features = nn.Sequential()
        size, channels = image_size, in_channels
        for factor in _PLAN:
            if factor == _POOL:
                if size > 1:
                    self.features.append(nn.MaxPool2d(2))
                    size //= 2
                continue
            num_outputs = next(remaining)
            self.features.append(nn.Conv2d(channels, num_outputs, 3, padding=1))
            self.features.append(nn.BatchNorm2d(num_outputs))
            self.features.append(nn.ReLU())
            channels = num_outputs
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images).mean(dim=(2, 3)))

    def with_widths(self, widths: Sequence[int]) -> "VGG11BN":
        """Build a fresh network for the same data with these `widths`."""
        return VGG11BN(*self._facts, widths=widths)
