"""A small convolutional network with BatchNorm, for quick runs."""

from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive, initialise

__all__ = ["CNN"]

_CHANNEL_FACTORS = (1, 2, 4)


class CNN(nn.Module):
    """Three times 3x3 convolution, BatchNorm, ReLU and max pooling, then one linear layer."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, *, width: int = 32
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; a map of one pixel is not
                pooled again.
            num_classes: Outputs.
            width: Channels of the first convolution; the others have 2 and 4 times as many.

        Raises:
            InputError: `width` is not an integer of at least 1.
        """
        super().__init__()
        check_positive("width", width)
        self.features = nn.Sequential()
        size, channels = image_size, in_channels
        for factor in _CHANNEL_FACTORS:
            # BatchNorm subtracts the mean: a bias before it would have no effect.
            self.features.append(nn.Conv2d(channels, factor * width, 3, padding=1, bias=False))
            self.features.append(nn.BatchNorm2d(factor * width))
            self.features.append(nn.ReLU())
            channels = factor * width
            if size > 1:
                self.features.append(nn.MaxPool2d(2))
                size //= 2
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images).mean(dim=(2, 3)))
