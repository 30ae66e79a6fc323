"""A small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

import torch
from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive
from memfold.backbones.transformer import Block, check_heads, initialise_transformer
from memfold.errors import InputError

__all__ = ["ViT"]


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks, the mean of all tokens, one linear layer."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        patch_size: int = 4,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels.
            num_classes: Outputs.
            patch_size: Height and width of a patch, in pixels; divides `image_size`.
            width: Of the residual stream.
            depth: Blocks.
            num_heads: Of attention.
            dropout: In the blocks, in [0, 1).

        Raises:
            InputError: An option is wrong.
        """
        super().__init__()
        check_heads(width, num_heads)
        check_positive("depth", depth)
        check_positive("patch_size", patch_size)
        if not isinstance(image_size, int) or image_size % patch_size:
            raise InputError(
                f"backbone.patch_size={patch_size}: must divide the image's size, {image_size}"
            )
        num_patches = (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.positions = nn.Parameter(torch.empty(num_patches, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, causal=False, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        initialise_transformer(self, depth)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are tables, not matrices."""
        return {"positions"}

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        x = self.patches(images).flatten(2).mT + self.positions
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x.mean(dim=1)))
