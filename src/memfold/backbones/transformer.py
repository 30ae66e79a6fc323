"""The pre-norm transformer blocks of `gpt`, `vit` and `table_transformer`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.backbones.initialisation import check_positive, check_widths
from memfold.errors import InputError

__all__ = ["Block", "Cache", "check_heads", "free_widths", "initialise_transformer", "rotary"]

Cache = list[tuple[Tensor, Tensor]]
"""Of each block: keys and values (B, heads, length, head width) of the tokens so far."""


def check_heads(width: int, num_heads: int) -> None:
    """Raise InputError unless the options `backbone.width` and `.num_heads` fit each other."""
    check_positive("width", width)
    check_positive("num_heads", num_heads)
    if width % (2 * num_heads):
        raise InputError(
            f"backbone.width={width}: must be a multiple of 2 backbone.num_heads={2 * num_heads}"
        )


def free_widths(
    width: int, num_heads: int, depth: int, hidden_widths: Sequence[int] | None
) -> tuple[int, ...]:
    """Return what can be chosen freely: pairs of channels of a head, then `Block.up` of each block.

    Raises:
        InputError: The options `backbone.width`, `.num_heads`, `.depth` and `.hidden_widths` do not
            fit each other.
    """
    check_heads(width, num_heads)
    check_positive("depth", depth)
    hidden = [4 * width] * depth if hidden_widths is None else hidden_widths
    return (width // (2 * num_heads), *check_widths("hidden_widths", hidden, depth))


def rotary(length: int, width: int) -> Tensor:
    """Return cosines, then sines, of rotary positions: (1, length, width).

    Su et al. 2021, "RoFormer", arXiv 2104.09864, equation 15: base 10,000.
    """
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)[None]


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate (B, heads, length, width) by positions (1 or B, length, width)."""
    cos, sin = positions.to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, num_heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(
        self, x: Tensor, positions: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map (B, L, width) to the same, and give keys and values of all tokens so far."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        if positions is not None:
            query, key = _rotated(query, positions), _rotated(key, positions)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        mask = None
        is_causal = self.is_causal and past is None
        if self.is_causal and past is not None and x.shape[1] > 1:
            ones = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device)
            mask = ones.tril(key.shape[2] - x.shape[1])
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.projection(attended.transpose(1, 2).flatten(2)), (key, value)


class Block(nn.Module):
    """x + attention(norm(x)), then x + two layers with GELU of norm(x)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        causal: bool,
        hidden_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Build a block.

        Args:
            width: Of the residual stream.
            num_heads: Of attention.
            causal: Whether a token sees only those before it.
            hidden_width: Between the two layers; by default 4 `width`.
            dropout: In attention and on what is added to the stream.
        """
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal=causal, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        hidden = 4 * width if hidden_width is None else hidden_width
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map (B, L, width) to the same, and give keys and values of all tokens so far."""
        attended, now = self.attention(self.norm1(x), positions, past)
        x = x + self.dropout(attended)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x))))), now


def initialise_transformer(model: nn.Module, depth: int) -> None:
    """Draw weights N(0, 0.02^2), biases 0; what is added to the stream is smaller with depth.

    As GPT-2: Radford et al. 2019, section 2.3, 1 / sqrt(number of residual layers).
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            is_added = name.endswith(("projection.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if is_added else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
