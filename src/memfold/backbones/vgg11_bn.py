"""VGG-11 with BatchNorm for small images.

Simonyan & Zisserman (2015), configuration A, with a single linear layer after global average
pooling, as used in the pruning literature on CIFAR (open_lth, SynFlow, STABLE-RPS).
"""

from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive, initialise

__all__ = ["VGG11BN"]

_POOL = 0
_PLAN = (1, _POOL, 2, _POOL, 4, 4, _POOL, 8, 8, _POOL, 8, 8)
"""Channels of each convolution as a multiple of the width, and where to pool."""


class VGG11BN(nn.Module):
    """8 convolutions (with biases) and one linear layer: 9,231,114 parameters for CIFAR-10."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, *, width: int = 64
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; a map of one pixel is not
                pooled again.
            num_classes: Outputs.
            width: Channels of the first convolution; the last have 8 times as many.

        Raises:
            InputError: `width` is not an integer of at least 1.
        """
        super().__init__()
        check_positive("width", width)
        self.features = nn.Sequential()
        size, channels = image_size, in_channels
        for factor in _PLAN:
            if factor == _POOL:
                if size > 1:
                    self.features.append(nn.MaxPool2d(2))
                    size //= 2
                continue
            self.features.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            self.features.append(nn.BatchNorm2d(factor * width))
            self.features.append(nn.ReLU())
            channels = factor * width
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images).mean(dim=(2, 3)))
