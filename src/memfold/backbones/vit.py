"""A small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive
from memfold.backbones.transformer import Block, free_widths, initialise_transformer
from memfold.errors import InputError

__all__ = ["ViT"]


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks, the mean of all tokens, one linear layer."""

    widths: tuple[int, ...]
    """Pairs of channels of a head, then the hidden width of each block."""

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
        hidden_widths: Sequence[int] | None = None,
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
            hidden_widths: Between the two layers of each block; by default 4 `width`.
            dropout: In the blocks, in [0, 1).

        Raises:
            InputError: An option is wrong.
        """
        super().__init__()
        self.widths = free_widths(width, num_heads, depth, hidden_widths)
        check_positive("patch_size", patch_size)
        if not isinstance(image_size, int) or image_size % patch_size:
            raise InputError(
                f"backbone.patch_size={patch_size}: must divide the image's size, {image_size}"
            )
        self._facts = (in_channels, image_size, num_classes)
        self._options: dict[str, Any] = {
            "patch_size": patch_size,
            "depth": depth,
            "num_heads": num_heads,
            "dropout": dropout,
        }
        num_patches = (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.positions = nn.Parameter(torch.empty(num_patches, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, causal=False, hidden_width=hidden, dropout=dropout)
            for hidden in self.widths[1:]
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

    def with_widths(self, widths: Sequence[int]) -> "ViT":
        """Build a fresh network for the same data, as deep, with these `widths`."""
        pairs, *hidden = widths
        width = 2 * self._options["num_heads"] * pairs
        return ViT(*self._facts, width=width, hidden_widths=hidden, **self._options)
