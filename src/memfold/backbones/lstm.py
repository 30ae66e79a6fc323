"""A recurrent network for tokens: the next one, or a class or numbers for the whole sequence."""

from torch import Tensor, nn

from memfold.backbones.initialisation import check_positive
from memfold.data.spec import DataSpec, NextToken, Tokens
from memfold.errors import InputError

__all__ = ["LSTM"]


class LSTM(nn.Module):
    """An embedding, LSTM layers, one linear layer: on every token, or on the mean of all."""

    def __init__(
        self, spec: DataSpec, *, width: int = 256, depth: int = 1, dropout: float = 0.0
    ) -> None:
        """Build the network.

        Args:
            spec: What the data are: tokens.
            width: Of the embedding and of each layer.
            depth: Layers.
            dropout: Between layers and before the head, in [0, 1).

        Raises:
            InputError: An option is wrong, or the data are no tokens.
        """
        super().__init__()
        check_positive("width", width)
        check_positive("depth", depth)
        if not isinstance(spec.inputs, Tokens):
            raise InputError(
                f"backbone=lstm takes tokens, and the data give {spec.inputs.kind}; "
                f"docs/backbones.md lists backbones for {spec.inputs.kind}"
            )
        self.is_causal = isinstance(spec.target, NextToken)
        self.embedding = nn.Embedding(spec.inputs.vocabulary_size, width)
        between = dropout if depth > 1 else 0.0
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, spec.num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L) to outputs (B, L, num_outputs), or (B, num_outputs) for a sequence."""
        states, _ = self.lstm(self.embedding(tokens))
        states = states if self.is_causal else states.mean(dim=1)
        return self.head(self.dropout(states))
