"""What fits into `budget_bytes`: the size of a file, before it is known what will be in it.

The file holds what the strategy stores, the untouched tensors, and a header that describes them.
All of its size follows from names, shapes, dtypes and options, so that a number of values can be
chosen by it before there are any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memfold.compression.accounting import state_tensors, storage_key, ties_of
from memfold.compression.merged_norms import merged_in, num_merged
from memfold.compression.record import Record
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.file_format import file_bytes
from memfold.quantisation import packed_like

if TYPE_CHECKING:
    from memfold.compression.strategy import Strategy

__all__ = ["Budget", "Stored", "like", "share_budget"]

_SPREAD = 64
"""More bytes than a header changes by with the digits of the budget."""


@dataclass(frozen=True)
class Stored:
    """What a strategy may choose to store, without values: tensors are on the meta device."""

    num_values: int
    values: Mapping[str, Tensor]
    """What `Compression.value_tensors` would be."""
    indices: Mapping[str, Tensor]
    """What `Compression.index_tensors` would be, without coding."""
    untouched: Mapping[str, Tensor] | None = None
    """All other tensors, where they are not those of the dense model."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Names of others that become one tensor with another -> its name."""


class Budget:
    """The file of a model that a strategy is about to compress."""

    def __init__(
        self, strategy: "Strategy", model: nn.Module, weights: Sequence[CompressibleWeight]
    ) -> None:
        """Take note of the dense model.

        Args:
            strategy: It has `budget_bytes`.
            model: The root module.
            weights: The compressible weights.
        """
        own = {storage_key(weight.tensor) for weight in weights}
        self._strategy = strategy
        self._model = model
        self._weights = {weight.name: list(weight.shape) for weight in weights}
        self._untouched = {
            name: like(tensor.shape, tensor.dtype)
            for name, tensor in state_tensors(model).items()
            if storage_key(tensor) not in own
        }
        self._ties = ties_of(model)

    def file_bytes(self, stored: Stored) -> int:
        """Return the size of the file; at most that, where values and masks are coded."""
        return self._file_bytes(stored, self._strategy)

    def most(self, choose: Callable[[int], Stored], least: int, most: int, needs: str) -> int:
        """Return the largest number whose file fits; one more would not, up to `most`.

        Args:
            choose: Number -> what would be stored.
            least: The smallest number that will do.
            most: The largest.
            needs: What the smallest one stores, for the message.

        Raises:
            InputError: The file of the smallest number is too large.
        """
        limit = self._strategy.budget_bytes
        assert limit is not None
        if self.file_bytes(choose(most)) <= limit:
            return most
        smallest = choose(least)
        size = self.file_bytes(smallest)
        if size > limit:
            # The header has the budget in it, whose digits move its size by a few bytes.
            needed = max(limit + 1, size - _SPREAD)
            while self._file_bytes(smallest, replace(self._strategy, budget_bytes=needed)) > needed:
                needed += 1
            raise InputError(
                f"budget_bytes={limit} is too small: the smallest file, with its header, the "
                f"untouched tensors (biases, norms, buffers, excluded weights) and {needs}, takes "
                f"{needed} bytes"
            )
        while most - least > 1:
            middle = (least + most) // 2
            fits = self.file_bytes(choose(middle)) <= limit
            least, most = (middle, most) if fits else (least, middle)
        return least

    def _file_bytes(self, stored: Stored, strategy: "Strategy") -> int:
        untouched = self._untouched if stored.untouched is None else stored.untouched
        tensors = {
            name: like(tensor.shape, strategy.untouched_dtype(tensor.dtype))
            for name, tensor in untouched.items()
            if name not in stored.ties
        }
        dense = {name: list(tensor.shape) for name, tensor in self._untouched.items()}
        reshaped = {n: dense[n] for n, t in tensors.items() if list(t.shape) != dense[n]}
        merged = None
        if strategy.merge_norms:
            statistics = merged_in(self._model, tensors, frozenset(stored.ties.values()))
            tensors = {name: t for name, t in tensors.items() if name not in statistics}
            merged = num_merged(statistics)
        tensors |= stored.indices
        for name, value in stored.values.items():
            parts = packed_like(value.shape, strategy.packing, value.dtype)
            tensors |= {name + suffix: part for suffix, part in parts.items()}
        ties = {**self._ties, **stored.ties}
        record = Record(
            strategy,
            stored.num_values,
            self._weights,
            {name: list(value.shape) for name, value in stored.values.items()},
            frozenset(stored.indices),
            reshaped,
            {name: ties.get(first, first) for name, first in ties.items()},
            merged,
        )
        return file_bytes(record.to_dict(), tensors)


def like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def share_budget(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` values in proportion to `sizes`, at least one each, exactly.

    What rounding down leaves goes to the largest remainders, the earlier tensor first.
    """
    spare = total - len(sizes)
    rest = [size - 1 for size in sizes]
    whole = max(1, sum(rest))
    shares = [1 + spare * size // whole for size in rest]
    order = sorted(range(len(sizes)), key=lambda i: (-(spare * rest[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
