"""What modules compute their weights, or their products with them, with."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from memfold.compression.parts import PartSource

if TYPE_CHECKING:
    from memfold.strategies.sharing.shared_vector import SharedVector

__all__ = ["ProductView", "View", "autocasts"]

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


def autocasts(module: nn.Module) -> bool:
    """Whether a layer's own forward gives its weight to an operation that autocast lowers."""
    if isinstance(module, nn.MultiheadAttention):
        return type(module).forward is nn.MultiheadAttention.forward
    return any(type(module).forward is layer.forward for layer in _AUTOCAST_LAYERS)
