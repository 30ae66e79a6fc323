"""The residual network that ResNet-20 and ResNet-18 are two sizes of.

He et al., "Deep Residual Learning for Image Recognition", 2016, with a 3x3 stem for small images
and projection shortcuts (1x1 convolution and BatchNorm) wherever a block changes the shape.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from memfold.backbones.initialisation import check_widths

__all__ = ["BasicBlock", "ResidualNetwork"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(
        self, in_channels: int, inner_channels: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        residual = F.relu(self.norm1(self.conv1(features)))
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(features))


class ResidualNetwork(nn.Module):
    """A 3x3 stem, stages of BasicBlocks, global average pooling, one linear layer.

    Every stage after the first halves the image. Global pooling takes what is left, so the
    network does not depend on the image size.
    """

    widths: tuple[int, ...]
    """Channels of each stage, then of each block's first convolution, in the order of use."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stage_widths: Sequence[int],
        num_blocks: int,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network with torch's default weights; the backbones draw their own.

        Args:
            in_channels: Channels of an image.
            num_classes: Outputs.
            stage_widths: Channels of each stage; the stem has those of the first.
            num_blocks: Blocks in a stage.
            widths: Instead of `stage_widths`: the channels of each stage, then, block after block,
                those between its two convolutions, which no shortcut ties to the stage's.

        Raises:
            InputError: `widths` has another length, or not only integers of at least 1.
        """
        super().__init__()
        num_stages = len(stage_widths)
        if widths is None:
            widths = [*stage_widths, *(w for w in stage_widths for _ in range(num_blocks))]
        self.widths = check_widths("widths", widths, num_stages * (1 + num_blocks))
        inner_widths = iter(self.widths[num_stages:])
        channels = self.widths[0]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for stage, width in enumerate(self.widths[:num_stages]):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(BasicBlock(channels, next(inner_widths), width, stride))
                channels = width
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        features = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))
