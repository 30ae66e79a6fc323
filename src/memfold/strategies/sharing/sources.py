"""What modules compute their weights, or their products with them, with."""

from collections.abc import Callable
from typing import TYPE_CHECKING
from warnings import warn

from torch import Tensor, nn

from memfold.compression.parts import PartSource
from memfold.compression.selection import CompressibleWeight

if TYPE_CHECKING:
    from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["ProductView", "View", "autocasts", "padding_row_of", "zero_row_of"]

_AUTOCAST_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class View(PartSource):
    """What a module computes its weight with."""

    def __init__(self, shared: "SharedVector", index: int, *, autocasts: bool) -> None:
        super().__init__(shared, index)
        self.shared = shared
        self.autocasts = autocasts
        self.converted: Tensor | None = None
        """Empty, of the dtype and device that the layer alone, not the model, was moved to."""

    def __call__(self) -> Tensor:
        """Build the weight."""
        weight = self.shared.weight(self.index, autocasts=self.autocasts)
        return weight if self.converted is None else weight.to(self.converted)

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `WeightSource.convert`."""
        values = self.shared.values
        moved = change(values.new_empty(0))
        same = moved.dtype == values.dtype and moved.device == values.device
        self.converted = None if same else moved


class ProductView(View):
    """What a module multiplies with, where that is cheaper without computing its weight."""

    def product(self, inputs: Tensor) -> Tensor | None:
        """See `ProductSource.product`."""
        return None if self.converted is not None else self.shared.product(self.index, inputs)


def padding_row_of(weight: CompressibleWeight) -> int | None:
    """Row of an embedding that is padding, unless a tied layer trains it."""
    module = weight.owners[0].module
    if len(weight.owners) > 1 or not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    return module.padding_idx


def zero_row_of(weight: CompressibleWeight) -> int | None:
    """Row of an embedding that stays zero: `padding_row_of`; warn where it has values."""
    row = padding_row_of(weight)
    if row is not None and not weight.tensor.is_meta and bool(weight.tensor.detach()[row].any()):
        warn(
            f"{weight.name}: the padding row {row} is not zero and cannot be kept; it becomes zero",
            stacklevel=2,
        )
    return row


def autocasts(module: nn.Module) -> bool:
    """Whether a layer's own forward gives its weight to an operation that autocast lowers."""
    if isinstance(module, nn.MultiheadAttention):
        return type(module).forward is nn.MultiheadAttention.forward
    return any(type(module).forward is layer.forward for layer in _AUTOCAST_LAYERS)
