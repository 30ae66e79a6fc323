"""Copies of a model whose weights move: what is written into one that stayed behind is noticed.

A copy made by `copy.deepcopy` keeps the positions of that moment. Averages of weights, target
networks and the like write entry i of the trained model's values over entry i of the copy's, which
is another weight once the trained model has moved. Nothing in PyTorch tells, so a copy that is left
behind remembers what its values were, until it is trained itself: until gradients come.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from memfold.compression.computed_weights import ComputedWeights
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Strategy
from memfold.errors import InputError

__all__ = ["MovableWeights"]


class MovableWeights(ComputedWeights):
    """Weights of values whose positions change, and whose copies are used where they may be.

    Weight number i has its values, shape (n,), in part "values", and `positions[i]`, int64 of the
    same shape.
    """

    positions: list[Tensor]

    def __init__(
        self, strategy: Strategy, model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        super().__init__(strategy, model, weights)
        self._copies = _Copies()
        self._copies.members.add(self)
        self._is_trained = False
        self._known: list[_Content] | None = None

    def _leave_copies_behind(self) -> None:
        """Let untrained copies at the same positions remember their values: these move away."""
        if not self._is_trained:
            return
        for other in self._copies.members - self._copies.left_behind:
            pairs = zip(self.positions, other.positions, strict=True)
            if not other._is_trained and all(torch.equal(a, b.to(a.device)) for a, b in pairs):
                other._known = other._contents()
                self._copies.left_behind.add(other)

    def _train(self) -> None:
        """Note that `before_step` trains this.

        Raises:
            InputError: Something was written into it after it was left behind.
        """
        if self in self._copies.left_behind:
            self._check_copies()
        self._is_trained = True
        self._catch_up()

    def _note_values(self) -> None:
        """Note that an optimizer has stepped: the values are its own."""
        self._known = self._contents() if self._copies.left_behind else None

    def _catch_up(self, _: Tensor | None = None) -> None:
        """Stop to look at what is written: values and positions are set together from here."""
        self._known = None
        self._copies.left_behind.discard(self)

    def _check_use(self, index: int) -> None:
        """Check weight number `index` where it is computed; in training only copies."""
        if self._known is None or torch.compiler.is_compiling():
            return
        if self in self._copies.left_behind or not torch.is_grad_enabled():
            self._check_copies([index])

    def _check_copies(self, indices: Sequence[int] | None = None) -> None:
        """Check that nothing was written both here and into a copy that was left behind.

        This may be that copy. If it is the trained model, averages were put into it, as callbacks
        do; its own steps are known.

        Args:
            indices: Of the weights; all of them when `None`.

        Raises:
            InputError: It was.
        """
        for index in range(len(self.shapes)) if indices is None else indices:
            copies = self._copies.left_behind
            if self._was_written(index) and any(copy._was_written(index) for copy in copies):
                raise InputError(
                    f"{self.names[index]}: values of a copy were changed after the model that it "
                    f"was copied from moved its weights ({self.strategy.name}), so they belong to "
                    "different positions: average or copy dense weights, those of "
                    "memfold.densify(model), or use load_state_dict"
                )

    def _was_written(self, index: int) -> bool:
        if self._known is None:
            return False
        before, now = self._known[index], self._content(index)
        if before.dtype != now.dtype:  # converted
            self._known[index] = now
        return before.dtype == now.dtype and int(before.checksum) != int(now.checksum)

    def _contents(self) -> list["_Content"]:
        return [self._content(index) for index in range(len(self.shapes))]

    def _content(self, index: int) -> "_Content":
        values = self.part(index, "values").detach()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
        return _Content(values.dtype, values.view(integers).sum(dtype=torch.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this object's own training."""
        known = self._known if self in self._copies.left_behind else None
        return vars(self) | {"_is_trained": False, "_known": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Join the copies."""
        vars(self).update(state)
        self._copies.members.add(self)
        if self._known is not None:
            self._copies.left_behind.add(self)


class _Copies:
    """Compressions that were copied from each other and are alive; all of them hold this object."""

    def __init__(self) -> None:
        self.members: WeakSet[MovableWeights] = WeakSet()
        self.left_behind: WeakSet[MovableWeights] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> "_Copies":
        """Stay the same object."""
        return self

    def __reduce__(self) -> tuple[type["_Copies"], tuple[()]]:
        """Know nobody in another process."""
        return _Copies, ()


class _Content(NamedTuple):
    """What tells whether numbers have been changed."""

    dtype: torch.dtype
    checksum: Tensor
    """Sum of the bits, int64, the same on every device; a number would wait for a GPU."""
