"""A multilayer perceptron, on the flattened image or on the columns of a table."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from memfold.backbones.facts import named_facts
from memfold.backbones.initialisation import check_positive, check_widths, initialise
from memfold.backbones.tables import TableMLP
from memfold.data.spec import DataSpec, Table

__all__ = ["MLP", "build_mlp"]


class MLP(nn.Module):
    """Linear layers with ReLU between them, Kaiming normal weights, zero biases."""

    widths: tuple[int, ...]
    """Outputs of each hidden layer."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 256,
        hidden_widths: Sequence[int] | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of an image.
            image_size: Height and width of an image, in pixels.
            num_classes: Outputs.
            width: Outputs of each of the two hidden layers, when `hidden_widths` is not given.
            hidden_widths: Outputs of each hidden layer instead; empty for a linear model.

        Raises:
            InputError: A width is not an integer of at least 1.
        """
        super().__init__()
        check_positive("width", width)
        hidden = [width, width] if hidden_widths is None else hidden_widths
        self.widths = check_widths("hidden_widths", hidden)
        self._facts = (in_channels, image_size, num_classes)
        widths = [in_channels * image_size**2, *self.widths]
        self.hidden = nn.Sequential()
        for num_inputs, num_outputs in pairwise(widths):
            self.hidden.append(nn.Linear(num_inputs, num_outputs))
            self.hidden.append(nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.hidden(images.flatten(1)))

    def with_widths(self, widths: Sequence[int]) -> "MLP":
        """Build a fresh network for the same data with these hidden `widths`."""
        return MLP(*self._facts, hidden_widths=widths)


def build_mlp(
    spec: DataSpec, *, width: int = 256, hidden_widths: Sequence[int] | None = None
) -> nn.Module:
    """Build a perceptron for images or for a table.

    Args:
        spec: What the data are.
        width: Outputs of each of the two hidden layers, when `hidden_widths` is not given.
        hidden_widths: Outputs of each hidden layer instead; empty for a linear model.

    Raises:
        InputError: A width is not an integer of at least 1, or the data are tokens.
    """
    kind = TableMLP if isinstance(spec.inputs, Table) else MLP
    facts: dict[str, Any] = named_facts(kind, spec, "backbone=mlp")
    return kind(**facts, width=width, hidden_widths=hidden_widths)
