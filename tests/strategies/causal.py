"""A transformer for images whose patches see those before them alone."""

from memfold.backbones.vit import ViT


class CausalViT(ViT):
    """For strategies that need an order."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 32,
        depth: int = 4,
        num_heads: int = 4,
    ) -> None:
        """See `ViT`; 4 patches."""
        super().__init__(
            in_channels,
            image_size,
            num_classes,
            patch_size=image_size // 2,
            width=width,
            depth=depth,
            num_heads=num_heads,
        )
        for block in self.blocks:
            block.attention.is_causal = True
