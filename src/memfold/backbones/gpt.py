"""A small decoder-only transformer for next tokens."""

from typing import Literal

import torch
from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive
from memfold.backbones.transformer import (
    Block,
    Cache,
    check_heads,
    initialise_transformer,
    rotary,
)
from memfold.errors import InputError

__all__ = ["GPT"]

_POSITIONS = ("rotary", "learned")


class GPT(nn.Module):
    """Pre-norm blocks of causal attention, a final norm, and a head that is tied by default.

    0.8 million weights for bytes by default.
    """

    positions: Tensor | None

    def __init__(
        self,
        vocabulary_size: int,
        length: int,
        *,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        positions: Literal["rotary", "learned"] = "rotary",
        tied_head: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """Build the network.

        Args:
            vocabulary_size: Tokens there are.
            length: Tokens of a sequence, at most.
            width: Of the residual stream.
            depth: Blocks.
            num_heads: Of attention.
            positions: `rotary`, or a `learned` vector for each.
            tied_head: Whether the head is the embedding.
            dropout: Everywhere in the blocks and after the embedding, in [0, 1).

        Raises:
            InputError: An option is wrong.
        """
        super().__init__()
        check_heads(width, num_heads)
        check_positive("depth", depth)
        if positions not in _POSITIONS:
            raise InputError(f"backbone.positions={positions}: must be one of {_POSITIONS}")
        self.length = length
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.learned = nn.Embedding(length, width) if positions == "learned" else None
        table = rotary(length, width // num_heads) if positions == "rotary" else None
        self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, causal=True, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        initialise_transformer(self, depth)
        if tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, kv_cache: Cache | None = None) -> Tensor:
        """Map tokens (B, L) to the logits (B, L, vocabulary_size) of those that follow.

        Args:
            tokens: int64; at most `length` of them with those in the cache.
            kv_cache: Keys and values of the tokens before, to which those of `tokens` are added; an
                empty list at the beginning.
        """
        start = kv_cache[0][0].shape[2] if kv_cache else 0
        end = start + tokens.shape[1]
        if end > self.length:
            raise InputError(f"gpt takes at most {self.length} tokens, got {end}")
        x = self.embedding(tokens)
        if self.learned is not None:
            x = x + self.learned(torch.arange(start, end, device=tokens.device))
        x = self.dropout(x)
        table = None if self.positions is None else self.positions[:, start:end]
        for number, block in enumerate(self.blocks):
            before = kv_cache[number] if kv_cache and number < len(kv_cache) else None
            x, now = block(x, table, before)
            if kv_cache is not None:
                kv_cache[number : number + 1] = [now]
        return self.head(self.norm(x))
