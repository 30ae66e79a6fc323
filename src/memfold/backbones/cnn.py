"""A small convolutional network with BatchNorm, for quick runs."""

from collections.abc import Sequence

from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive, check_widths, initialise

__all__ = ["CNN"]

_CHANNEL_FACTORS = (1, 2, 4)


class CNN(nn.Module):
    """Three times 3x3 convolution, BatchNorm, ReLU and max pooling, then one linear layer."""

    widths: tuple[int, ...]
    """Channels of each convolution."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 32,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; a map of one pixel is not
                pooled again.
            num_classes: Outputs.
            width: Channels of the first convolution; the others have 2 and 4 times as many.
            widths: Channels of each of the three convolutions instead.

        Raises:
            InputError: A width is not an integer of at least 1, or there are not three `widths`.
        """
        super().__init__()
        check_positive("width", width)
        if widths is None:
            widths = [factor * width for factor in _CHANNEL_FACTORS]
        self.widths = check_widths("widths", widths, len(_CHANNEL_FACTORS))
        self._facts = (in_channels, image_size, num_classes)
        self.features = nn.Sequential()
        size, channels = image_size, in_channels
        for num_outputs in self.widths:
            # BatchNorm subtracts the mean: a bias before it would have no effect.
            self.features.append(nn.Conv2d(channels, num_outputs, 3, padding=1, bias=False))
            self.features.append(nn.BatchNorm2d(num_outputs))
            self.features.append(nn.ReLU())
            channels = num_outputs
            if size > 1:
                self.features.append(nn.MaxPool2d(2))
                size //= 2
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images).mean(dim=(2, 3)))

    def with_widths(self, widths: Sequence[int]) -> "CNN":
        """Build a fresh network for the same data with these `widths`."""
        return CNN(*self._facts, widths=widths)
