"""ResNet-18 for small images, such as the 64x64 pixels of Tiny-ImageNet."""

from collections.abc import Sequence

from memfold.backbones.initialisation import check_positive, initialise
from memfold.backbones.residual import ResidualNetwork

__all__ = ["ResNet18"]


class ResNet18(ResidualNetwork):
    """4 stages of 2 blocks, 64 to 512 channels: 11,271,432 parameters for 200 classes.

    The stem is a 3x3 convolution without pooling, for images much smaller than ImageNet's.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        *,
        width: int = 64,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; any size gives the same network.
            num_classes: Outputs.
            width: Channels of the first stage; the others have 2, 4 and 8 times as many.
            widths: Channels of the 4 stages and then of the first convolution of the 8 blocks
                instead.

        Raises:
            InputError: A width is not an integer of at least 1, or there are not 12 `widths`.
        """
        check_positive("width", width)
        stage_widths = (width, 2 * width, 4 * width, 8 * width)
        super().__init__(
            in_channels, num_classes, stage_widths=stage_widths, num_blocks=2, widths=widths
        )
        self._facts = (in_channels, image_size, num_classes)
        initialise(self, fan="fan_out")
        # As in the code of SynFlow and STABLE-RPS, the head keeps torch's own weights and bias.
        self.head.reset_parameters()

    def with_widths(self, widths: Sequence[int]) -> "ResNet18":
        """Build a fresh network for the same data with these `widths`."""
        return ResNet18(*self._facts, widths=widths)
