"""A small decoder-only transformer for next tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memfold.backbones.transformer import (
    Block,
    Cache,
    free_widths,
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
    widths: tuple[int, ...]
    """Pairs of channels of a head, then the hidden width of each block."""

    def __init__(
        self,
        vocabulary_size: int,
        length: int,
        *,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        hidden_widths: Sequence[int] | None = None,
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
            hidden_widths: Between the two layers of each block; by default 4 `width`.
            positions: `rotary`, or a `learned` vector for each.
            tied_head: Whether the head is the embedding.
            dropout: Everywhere in the blocks and after the embedding, in [0, 1).

        Raises:
            InputError: An option is wrong.
        """
        super().__init__()
        self.widths = free_widths(width, num_heads, depth, hidden_widths)
        if positions not in _POSITIONS:
            raise InputError(f"backbone.positions={positions}: must be one of {_POSITIONS}")
        self.length = length
        self._facts = (vocabulary_size, length)
        self._options: dict[str, Any] = {
            "depth": depth,
            "num_heads": num_heads,
            "positions": positions,
            "tied_head": tied_head,
            "dropout": dropout,
        }
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.learned = nn.Embedding(length, width) if positions == "learned" else None
        table = rotary(length, width // num_heads) if positions == "rotary" else None
        self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, causal=True, hidden_width=hidden, dropout=dropout)
            for hidden in self.widths[1:]
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

    def with_widths(self, widths: Sequence[int]) -> "GPT":
        """Build a fresh network for the same data, as deep, with these `widths`."""
        pairs, *hidden = widths
        width = 2 * self._options["num_heads"] * pairs
        return GPT(*self._facts, width=width, hidden_widths=hidden, **self._options)
