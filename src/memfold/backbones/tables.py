"""Networks for tables: numbers and categories of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive
from memfold.backbones.transformer import Block, check_heads, initialise_transformer

__all__ = ["Columns", "TableTransformer"]


class Columns(nn.Module):
    """Splits rows (B, num_numeric + categories) into numbers and embedded categories.

    The width of an embedding is min(50, 1.6 cardinality^0.56), as in fastai's tabular models.
    """

    def __init__(self, num_numeric: int, cardinalities: Sequence[int], width: int | None) -> None:
        """Build the embeddings.

        Args:
            num_numeric: Columns of numbers.
            cardinalities: Of the columns of categories.
            width: Of every embedding; `None`: by the cardinality.
        """
        super().__init__()
        self.num_numeric = num_numeric
        widths = [width or min(50, round(1.6 * size**0.56)) for size in cardinalities]
        pairs = zip(cardinalities, widths, strict=True)
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size, width in pairs)
        self.width = num_numeric + sum(widths)

    def forward(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return numbers (B, num_numeric), and for each category (B, its width)."""
        numbers, codes = rows[:, : self.num_numeric], rows[:, self.num_numeric :].long()
        pairs = zip(self.embeddings, codes.unbind(1), strict=True)
        return numbers, [embedding(code) for embedding, code in pairs]


class TableTransformer(nn.Module):
    """A token for each column, transformer blocks, the output of one more token.

    Gorishniy et al. 2021, "Revisiting deep learning models for tabular data" (FT-Transformer),
    arXiv 2106.11959, with GELU in place of ReGLU.
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        num_outputs: int,
        *,
        width: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        """Build the network.

        Args:
            num_numeric: Columns of numbers.
            cardinalities: Of the columns of categories.
            num_outputs: Outputs.
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
        self.columns = Columns(num_numeric, cardinalities, width)
        self.slopes = nn.Parameter(torch.empty(num_numeric, width))
        self.offsets = nn.Parameter(torch.empty(num_numeric + len(cardinalities), width))
        self.reader = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, causal=False, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)
        initialise_transformer(self, depth)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are tables, not matrices."""
        return {"slopes", "offsets", "reader"}

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (B, num_numeric + categories) to outputs (B, num_outputs)."""
        numbers, embedded = self.columns(rows)
        tokens = [numbers[:, :, None].to(self.slopes.dtype) * self.slopes]
        if embedded:
            tokens.append(torch.stack(embedded, dim=1))
        x = torch.cat(tokens, dim=1) + self.offsets
        x = torch.cat([self.reader.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x[:, 0]))
