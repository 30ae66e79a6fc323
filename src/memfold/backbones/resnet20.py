"""ResNet-20 as the authors of STABLE-RPS trained it.

It is the CIFAR network of He et al. (2016), section 4.2, with projection shortcuts in place of
padded ones, and with BatchNorm weights that start uniform in (0, 1), as in the code behind
"In defense of parameter sharing for model-compression" (arXiv 2310.11611) and in open_lth.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from memfold.backbones.initialisation import check_pooling, check_positive, initialise
from memfold.backbones.residual import ResidualNetwork
from memfold.errors import InputError

__all__ = ["ResNet20"]

_NORM_INITS = ("uniform", "ones")


class ResNet20(ResidualNetwork):
    """3 stages of 3 blocks with 16, 32 and 64 channels: 272,474 parameters for CIFAR-10."""

    def __init__(
        self,
        in_channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        *,
        width: int = 16,
        widths: Sequence[int] | None = None,
        norm_init: Literal["uniform", "ones"] = "uniform",
        pooling: int = 1,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels; any size gives the same network.
            num_classes: Outputs.
            width: Channels of the first stage; the others have 2 and 4 times as many.
            widths: Channels of the 3 stages and then of the first convolution of the 9 blocks
                instead.
            norm_init: First BatchNorm weights: "uniform" in (0, 1), or "ones".
            pooling: Height and width of the squares of pixels whose means it sees, in pixels: 2
                leaves a quarter of the multiply-adds.

        Raises:
            InputError: A width is not an integer of at least 1, there are not 12 `widths`,
                `norm_init` is unknown, or a square does not fit into an image.
        """
        check_positive("width", width)
        check_pooling(pooling, image_size)
        if norm_init not in _NORM_INITS:
            raise InputError(f"backbone.norm_init={norm_init}: must be one of {_NORM_INITS}")
        super().__init__(
            in_channels,
            num_classes,
            stage_widths=(width, 2 * width, 4 * width),
            num_blocks=3,
            widths=widths,
        )
        self._facts = (in_channels, image_size, num_classes)
        self._options: dict[str, Any] = {"norm_init": norm_init, "pooling": pooling}
        self.pooling = pooling
        initialise(self, norm_weight=norm_init)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return super().forward(images if self.pooling == 1 else F.avg_pool2d(images, self.pooling))

    def with_widths(self, widths: Sequence[int]) -> "ResNet20":
        """Build a fresh network for the same data and options with these `widths`."""
        return ResNet20(*self._facts, widths=widths, **self._options)
