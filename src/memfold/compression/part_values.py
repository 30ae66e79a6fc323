"""Computed weights that an artifact holds as one vector: their parts, and weights left whole."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from memfold.compression.accounting import storage_key
from memfold.compression.budget import Stored, like
from memfold.compression.materialise import device_of
from memfold.compression.parts import ComputedWeights, Level
from memfold.compression.selection import CompressibleWeight

__all__ = ["PartValues"]


class PartValues(ComputedWeights):
    """Parts whose shapes are known before their values; weight after weight, they are one vector.

    A weight that stays whole, a dense parameter, stands there as it is.
    """

    values_name: ClassVar[str]
    """Name of the vector in artifacts."""

    @abstractmethod
    def part_shape(self, index: int, name: str) -> Sequence[int]:
        """Return the shape of a part of weight number `index`, or of one in `stored_parts`."""

    @property
    def stored_parts(self) -> Mapping[str, Level]:
        """What the vector has of each weight, group or model: here, the parts."""
        return self.parts

    def stored_part(self, index: int, name: str) -> Tensor:
        """Return one of `stored_parts`."""
        return self.part(index, name)

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`.

        Raises:
            ValueError: One has another shape than `part_shape` says, too.
        """
        given = {name: list(parts[name]) for name in self.parts}
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.parts}
        for index, name in self._slots(self.parts):
            if name is not None:
                shapes[name].append(tuple(self.part_shape(index, name)))
        for name, tensors in given.items():
            for tensor, shape in zip(tensors, shapes[name], strict=False):
                if tensor.shape != shape:
                    found = tuple(tensor.shape)
                    raise ValueError(f"{name} of shape {found} is given, not {shape}")
        super().attach(given)

    def accept(self, weights: Sequence[CompressibleWeight], tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by an artifact's values; the model is unchanged when this raises.

        Raises:
            InputError: The values are missing or do not fit.
        """
        device, dtype = device_of(self.model, weights), weights[0].tensor.dtype
        values = self.values_in(tensors, self.values_name).to(device, dtype)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        for index, name in self._slots(self.stored_parts):
            shape = self.shapes[index] if name is None else self.part_shape(index, name)
            chunk, values = values.tensor_split([prod(shape)])
            if name is None:
                weights[index].tensor.detach().copy_(chunk.view(*shape))
            else:
                parts[name].append(chunk.view(*shape).clone())
        self.attach(parts)

    def described(self, dtype: torch.dtype) -> Stored:
        """Describe what an artifact will store, before there are values."""
        return Stored(self.num_values, {self.values_name: like([self.num_values], dtype)}, {})

    @property
    def num_values(self) -> int:
        """Numbers in what is stored of the parts and in the weights left whole."""
        slots = self._slots(self.stored_parts)
        return sum(prod(self.shapes[i] if n is None else self.part_shape(i, n)) for i, n in slots)

    @property
    def index_bytes(self) -> int:
        """Nothing, where the options and the number of values tell all."""
        return 0

    @property
    def index_format(self) -> str:
        """See `Compression.index_format`."""
        return "none"

    def index_tensors(self) -> dict[str, Tensor]:
        """Nothing; see `index_bytes`."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts and of the weights left whole."""
        return next(self._tensors()).dtype

    def owned_names(self) -> frozenset[str]:
        """See `Compression.owned_names`; tied tensors have several names."""
        held = {storage_key(tensor) for tensor in self._tensors()}
        state = self.model.state_dict(keep_vars=True).items()
        names = {k for k, v in state if isinstance(v, Tensor) and storage_key(v) in held}
        return super().owned_names() | names

    def stored_values(self) -> dict[str, list[Tensor]]:
        """See `Compression.stored_values`."""
        return {self.values_name: list(self._tensors())}

    def _slots(self, parts: Mapping[str, Level]) -> Iterator[tuple[int, str | None]]:
        """Yield weight number and name of every part once; no name for a weight left whole."""
        computed, seen = set(self.computed), set[tuple[str, int | None]]()
        for index in range(len(self.shapes)):
            if index not in computed:
                yield index, None
                continue
            for name, level in parts.items():
                whose = {"weight": index, "group": self.first(index), "model": None}[level]
                if (name, whose) not in seen:
                    seen.add((name, whose))
                    yield index, name

    def _tensors(self) -> Iterator[Tensor]:
        for index, name in self._slots(self.stored_parts):
            if name is None:
                module, attribute = self.places[index][0]
                yield getattr(module, attribute)
            else:
                yield self.stored_part(index, name)
