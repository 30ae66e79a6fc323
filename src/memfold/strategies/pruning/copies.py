"""Copies of a model whose weights move: what is written into one that stayed behind is noticed.

A copy keeps the positions of that moment, however it was made: by `copy.deepcopy`, by pickling,
from an artifact, or built alike and given the state dict. Averages of weights, target networks and
the like write entry i of the trained model's values over entry i of the copy's, which is another
weight once the trained model has moved. Nothing in PyTorch tells, so a copy that is left behind
remembers what its values were, until it is trained itself: until gradients come.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from memfold.compression.parts import ComputedWeights, Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Strategy
from memfold.errors import InputError

__all__ = ["MovableWeights"]


class MovableWeights(ComputedWeights):
    """Weights of values whose positions change, and whose copies are used where they may be.

    Weight number i has its values, shape (n,), in part "values", and `positions[i]`, int64 of the
    same shape.
    """

    parts: Mapping[str, Level] = {"values": "weight"}
    positions: list[Tensor]

    def __init__(
        self, strategy: Strategy, model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        super().__init__(strategy, model, weights)
        self._is_trained = False
        self._is_left_behind = False
        self._copies: WeakSet[MovableWeights] = WeakSet()
        """Those that this one has left behind."""
        self._known: list[_Content] | None = None

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`."""
        super().attach(parts)
        _ALIVE.add(self)

    def restore_dense(self) -> None:
        """See `Compression.restore_dense`."""
        _ALIVE.discard(self)
        super().restore_dense()

    def _leave_copies_behind(self) -> None:
        """Let untrained copies at the same positions remember their values: these move away."""
        if not self._is_trained:
            return
        for other in list(_ALIVE):
            if not (other._is_trained or other._is_left_behind) and self._is_at_place_of(other):
                other._known = other._contents()
                other._is_left_behind = True
                self._copies.add(other)

    def _is_at_place_of(self, other: "MovableWeights") -> bool:
        if (self.names, self.shapes) != (other.names, other.shapes):
            return False
        pairs = zip(self.positions, other.positions, strict=True)
        return all(torch.equal(a, b.to(a.device)) for a, b in pairs)

    def _train(self) -> None:
        """Note that `before_step` trains this.

        Raises:
            InputError: Something was written into it after it was left behind.
        """
        if self._is_left_behind:
            self._check_copies()
        self._is_trained = True
        self._catch_up()

    def _note_values(self) -> None:
        """Note that an optimizer has stepped: the values are its own."""
        self._known = self._contents() if self._copies else None

    def _catch_up(self, _: Tensor | None = None) -> None:
        """Stop to look at what is written: values and positions are set together from here."""
        self._known = None
        self._is_left_behind = False

    def _check_use(self, index: int) -> None:
        """Check weight number `index` where it is computed; in training only copies."""
        if self._known is None or torch.compiler.is_compiling():
            return
        if self._is_left_behind or not torch.is_grad_enabled():
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
        others = [self] if self._is_left_behind else [c for c in self._copies if c._is_left_behind]
        for index in range(len(self.shapes)) if indices is None else indices:
            if self._was_written(index) and any(other._was_written(index) for other in others):
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
        values = self.trained(self.part(index, "values")).detach()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
        return _Content(values.dtype, values.view(integers).sum(dtype=torch.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this object's own training."""
        state = vars(self) | {"_is_trained": False}
        del state["_copies"]
        return state if self._is_left_behind else state | {"_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be one of the copies from here."""
        vars(self).update(state)
        self._copies = WeakSet()
        _ALIVE.add(self)


class _Content(NamedTuple):
    """What tells whether numbers have been changed."""

    dtype: torch.dtype
    checksum: Tensor
    """Sum of the bits, int64, the same on every device; a number would wait for a GPU."""


_ALIVE: WeakSet[MovableWeights] = WeakSet()
"""All of this process that are part of a model."""
