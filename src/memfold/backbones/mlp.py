"""A multilayer perceptron, on the flattened image or on the columns of a table."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.backbones.facts import named_facts
from memfold.backbones.initialisation import (
    check_pooling,
    check_positive,
    check_widths,
    initialise,
)
from memfold.backbones.tables import Columns
from memfold.data.spec import DataSpec, Table
from memfold.errors import InputError

__all__ = ["MLP", "TableMLP", "build_mlp"]


class _Perceptron(nn.Module):
    """Linear layers with ReLU between them, Kaiming normal weights, zero biases."""

    widths: tuple[int, ...]
    """Outputs of each hidden layer."""
    _facts: tuple[Any, ...]
    """What a subclass was told of the data."""
    _options: dict[str, Any]
    """Of a subclass, beside the widths."""

    def _build(
        self,
        num_features: int,
        num_outputs: int,
        width: int,
        hidden_widths: Sequence[int] | None,
    ) -> None:
        """Build the layers, once the subclass has built what makes features of its inputs."""
        check_positive("width", width)
        hidden = [width, width] if hidden_widths is None else hidden_widths
        self.widths = check_widths("hidden_widths", hidden)
        widths = [num_features, *self.widths]
        self.hidden = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.hidden.append(nn.Linear(inputs, outputs))
            self.hidden.append(nn.ReLU())
        self.head = nn.Linear(widths[-1], num_outputs)
        initialise(self)

    def with_widths(self, widths: Sequence[int]) -> Self:
        """Build a fresh network for the same data with these hidden `widths`."""
        return type(self)(*self._facts, hidden_widths=widths, **self._options)


class MLP(_Perceptron):
    """A perceptron on the pixels of an image."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 256,
        hidden_widths: Sequence[int] | None = None,
        pooling: int = 1,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels.
            num_classes: Outputs.
            width: Outputs of each of the two hidden layers, when `hidden_widths` is not given.
            hidden_widths: Outputs of each hidden layer instead; empty for a linear model.
            pooling: Height and width of the squares of pixels whose means it sees, in pixels; what
                they leave of the image at its right and lower edges is not seen.

        Raises:
            InputError: A width is not an integer of at least 1, or a square does not fit into an
                image.
        """
        super().__init__()
        check_pooling(pooling, image_size)
        self._facts = (in_channels, image_size, num_classes)
        self._options = {"pooling": pooling}
        self.pooling = pooling
        num_features = in_channels * (image_size // pooling) ** 2
        self._build(num_features, num_classes, width, hidden_widths)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        seen = images if self.pooling == 1 else F.avg_pool2d(images, self.pooling)
        return self.head(self.hidden(seen.flatten(1)))


class TableMLP(_Perceptron):
    """A perceptron on the numbers and embedded categories of a row."""

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        num_outputs: int,
        *,
        width: int = 256,
        hidden_widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            num_numeric: Columns of numbers.
            cardinalities: Of the columns of categories.
            num_outputs: Outputs.
            width: See `MLP`.
            hidden_widths: See `MLP`.

        Raises:
            InputError: A width is not an integer of at least 1.
        """
        super().__init__()
        self._facts = (num_numeric, tuple(cardinalities), num_outputs)
        self._options = {}
        self.columns = Columns(num_numeric, cardinalities, None)
        self._build(self.columns.width, num_outputs, width, hidden_widths)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (B, num_numeric + categories) to outputs (B, num_outputs)."""
        numbers, embedded = self.columns(rows)
        features = torch.cat([numbers.to(self.head.weight.dtype), *embedded], dim=1)
        return self.head(self.hidden(features))


def build_mlp(
    spec: DataSpec,
    *,
    width: int = 256,
    hidden_widths: Sequence[int] | None = None,
    pooling: int = 1,
) -> nn.Module:
    """Build a perceptron for images or for a table.

    Args:
        spec: What the data are.
        width: Outputs of each of the two hidden layers, when `hidden_widths` is not given.
        hidden_widths: Outputs of each hidden layer instead; empty for a linear model.
        pooling: See `MLP`; 1 for a table.

    Raises:
        InputError: A width is not an integer of at least 1, `pooling` does not fit the data, or
            they are tokens.
    """
    if not isinstance(spec.inputs, Table):
        facts: dict[str, Any] = named_facts(MLP, spec, "backbone=mlp")
        return MLP(**facts, width=width, hidden_widths=hidden_widths, pooling=pooling)
    if pooling != 1:
        raise InputError(f"backbone.pooling={pooling}: a table has no pixels; it must be 1")
    facts = named_facts(TableMLP, spec, "backbone=mlp")
    return TableMLP(**facts, width=width, hidden_widths=hidden_widths)
