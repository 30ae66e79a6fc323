"""Weights that are computed from coordinates, and from what their names and the seed tell."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.budget import share_budget
from memfold.compression.part_values import PartValues
from memfold.compression.selection import CompressibleWeight, zero_row_of
from memfold.errors import InputError
from memfold.strategies.subspace.draws import Draws
from memfold.strategies.subspace.projections import PROJECTIONS

if TYPE_CHECKING:
    from memfold.strategies.subspace.subspace import Subspace

__all__ = ["SCALES", "VALUES", "SubspaceWeights"]

VALUES = "subspace_values"
SCALES = "subspace_scales"


class SubspaceWeights(PartValues):
    """Coordinates as a parameter of the model, or one beside each weight."""

    values_name: ClassVar[str] = VALUES
    root_names: ClassVar[tuple[str, ...]] = (VALUES, SCALES)

    def __init__(
        self,
        strategy: "Subspace",
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
    ) -> None:
        """Take note of the weights; `accept` then replaces them.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: All compressible weights.
            num_values: Coordinates in all.

        Raises:
            InputError: The name of a parameter is taken.
        """
        whole = strategy.per == "model"
        self.parts = {VALUES: "model" if whole else "weight"}
        super().__init__(strategy, model, weights)
        sizes = [weight.numel for weight in weights]
        columns = [num_values] * len(sizes) if whole else share_budget(sizes, num_values)
        heights = [sum(sizes)] * len(sizes) if whole else sizes
        self._options = f"{strategy.projection} {strategy.per}"
        kind, seed = PROJECTIONS[strategy.projection], strategy.seed
        shapes = zip(self.names, sizes, columns, heights, strict=True)
        self.projections = [kind(seed, *shape) for shape in shapes]
        self._starts = [Draws(seed, "start", name) for name in self.names]
        self._rows = [zero_row_of(weight) for weight in weights]
        self.scales: list[float] = []
        """Standard deviations of the initial weights."""

    def accept(self, weights: Sequence[CompressibleWeight], tensors: Mapping[str, Tensor]) -> None:
        """See `PartValues.accept`."""
        self._take_scales(tensors)
        super().accept(weights, tensors)

    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`, in the dtype of the coordinates."""
        values, projection = self.part(index, VALUES), self.projections[index]
        x = values.to(torch.promote_types(values.dtype, torch.float32))
        # The gradient leaves the factor out.
        x = x + (self._gain(index) - 1) * x.detach()
        # As a dense parameter, it takes part in mixed precision where it is used.
        with torch.autocast(x.device.type, enabled=False):
            start = self._starts[index].uniform(projection.rows, self.scales[index], x)
            weight = (start + projection(x)).view(self.shapes[index])
        row = self._rows[index]
        if row is not None:
            weight = weight.index_fill(0, torch.tensor([row], device=x.device), 0)
        return weight.to(values.dtype)

    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """See `PartValues.part_shape`."""
        return (self.projections[index].columns,)

    def reach(self, parameter: Tensor) -> Tensor | None:
        """See `Compression.reach`: sqrt(D / d) for every coordinate."""
        owners = (index for index in self.computed if self.part(index, VALUES) is parameter)
        index = next(owners, None)
        return None if index is None else torch.full_like(parameter, self._gain(index))

    @property
    def index_bytes(self) -> int:
        """A float32 scale per weight."""
        return 4 * len(self.scales)

    @property
    def index_format(self) -> str:
        """All else is a function of the seed."""
        return "seed"

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        return {SCALES: torch.tensor(self.scales, dtype=torch.float32)}

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: the scales, too."""
        return super().structure() | self.index_tensors()

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Take over the scales of coordinates that come from elsewhere.

        Raises:
            InputError: They do not fit.
        """
        super().adopt(structure)
        self._take_scales(structure)
        self.release()

    def marks(self, *places: Tensor) -> Tensor:
        """See `ComputedWeights.marks`: coordinates belong to one kind of projection."""
        return super().marks(*places, torch.tensor(list(self._options.encode())))

    def _gain(self, index: int) -> float:
        projection = self.projections[index]
        return (projection.height / projection.columns) ** 0.5

    def _take_scales(self, tensors: Mapping[str, Tensor]) -> None:
        scales, count = tensors.get(SCALES), len(self.names)
        if (
            scales is None
            or scales.shape != (count,)
            or not bool((scales > 0).all() and scales.isfinite().all())
        ):
            raise InputError(f"{SCALES} must be {count} finite numbers above 0")
        self.scales = scales.tolist()
