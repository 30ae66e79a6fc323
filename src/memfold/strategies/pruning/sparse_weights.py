"""Sparse weights: only the kept values are parameters, and the structure says where they belong.

Values, gradients and optimizer state have the length of what is kept, in training too; the
positions are int64 numbers beside them. A dense tensor exists while its layer needs it; a linear
layer that is sparse enough multiplies without one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from memfold.compression.accounting import tensor_bytes
from memfold.compression.computed_attributes import WeightSource
from memfold.compression.fingerprints import check_marks, fingerprint, is_fingerprint
from memfold.compression.optimizers import check_movable, in_bucket_of, move_state, optimizers_in
from memfold.compression.parts import MARKS, PartSource
from memfold.compression.selection import CompressibleWeight
from memfold.compression.state import Logged
from memfold.compression.strategy import Strategy
from memfold.errors import InputError
from memfold.strategies.pruning.copies import MovableWeights
from memfold.strategies.pruning.health import metrics_of
from memfold.strategies.pruning.product_costs import Linear, Product
from memfold.strategies.pruning.products import KeptProduct, RowBounds, can_multiply, multiply
from memfold.strategies.pruning.stored_masks import (
    CODED,
    COUNTS,
    FINGERPRINT,
    FINGERPRINT_BYTES,
    INDEX,
    VALUES,
    index_bytes,
    index_format,
    masks_of,
    pack,
)

__all__ = ["SparseWeights"]


class SparseWeights(MovableWeights):
    """Kept values as parameters `<weight>_values`, and their positions.

    Weight number i is zero but at `positions[i]`, sorted flat int64 indices into it.
    """

    is_resizable: ClassVar[bool] = True
    logged: ClassVar[Logged] = "changes"
    root_names: ClassVar[tuple[str, ...]] = (VALUES, COUNTS, INDEX, CODED, FINGERPRINT)

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        masks: Sequence[Tensor],
        *,
        linear: Linear,
    ) -> None:
        """Take note of the structure; `keep` then replaces the weights.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: The weights to replace.
            masks: Bool tensor of each weight's shape: what is kept.
            linear: How layers multiply.
        """
        super().__init__(strategy, model, weights)
        self.linear: Linear = linear
        self._layouts: dict[int, tuple[Tensor, RowBounds]] = {}
        self.positions = [mask.reshape(-1).nonzero().squeeze(1) for mask in masks]
        self.draw: Callable[[], Iterator[list[Tensor]]] | None = None
        """Draws these masks again, from the seed and the number of values alone; an artifact then
        stores no index. After them come those that earlier versions drew. CPU."""
        self._gradients: list[Tensor | None] | None = None
        self._optimizer: ref[Optimizer] | None = None
        self._watched: WeakSet[Optimizer] = WeakSet()
        self._state_is_loaded = False

    def keep(self, dense: Iterable[Tensor]) -> None:
        """Replace the weights, with the values that `dense` has at the kept positions."""
        pairs = zip(dense, self.positions, strict=True)
        values = (t.detach().reshape(-1)[at.to(t.device)] for t, at in pairs)
        self.attach({"values": list(values)})

    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`: zeros, and the kept values in their places."""
        values = self.part(index, "values")
        self._check_use(index)
        dense = values.new_zeros(self.shapes[index].numel())
        dense.index_copy_(0, self._positions_on(index, values.device), values)
        dense = dense.view(self.shapes[index])
        if self._gradients is not None and dense.requires_grad:
            dense.register_hook(partial(self._add_gradient, index))
        if self._known is not None and dense.requires_grad:
            dense.register_hook(self._catch_up)  # what is trained changes its values itself
        return dense

    def source(self, index: int, module: nn.Module) -> WeightSource:
        """See `ComputedWeights.source`."""
        return (PartSource if self.linear == "weight" else _KeptSource)(self, index)

    def product(self, index: int, inputs: Tensor) -> Tensor | None:
        """Multiply with weight number `index` without building it, where that is cheaper.

        Args:
            index: Of the weight, taken as a matrix: (first dimension, all others).
            inputs: Shape (..., columns).

        Returns:
            Shape (..., rows): inputs @ weight.T; `None` where the weight is to be built.
        """
        values, shape = self.values(index), self.shapes[index]
        rows, columns = shape[0], shape.numel() // shape[0]
        # Who watches dense gradients, or copies that were left behind, hooks into the weight.
        is_watched = self._gradients is not None or self._known is not None
        if is_watched or not can_multiply(inputs, values, rows, columns):
            return None
        has_graph = torch.is_grad_enabled()
        trains = has_graph and (values.requires_grad or inputs.requires_grad)
        lasts = not (has_graph or self.model.training)
        batch = inputs.shape[:-1].numel()
        product = Product(rows, columns, len(values), batch, trains=trains, lasts=lasts)
        if self.linear == "auto" and not product.is_cheaper_kept():
            return None
        if not lasts:
            self.release()
        positions = self._positions_on(index, values.device)
        if trains:
            return KeptProduct.apply(inputs, values, positions, rows)
        known = self._layouts.get(index)
        if known is None or known[0] is not positions:
            known = positions, RowBounds.of(positions, rows, columns)
            if lasts:
                self._layouts[index] = known
        return multiply(inputs, values, known[1])

    def release(self) -> None:
        """See `ComputedWeights.release`; where values lie goes, too, as evaluations find it."""
        super().release()
        self._layouts.clear()

    def values(self, index: int) -> nn.Parameter:
        """Return the kept values of weight number `index`, shape (kept,)."""
        return self.part(index, "values")

    def entries(self) -> Mapping[Tensor, tuple[torch.Size, Tensor]]:
        """See `Compression.entries`: the kept values."""
        values = [self.values(index) for index in range(len(self.shapes))]
        places = [self._positions_on(index, v.device) for index, v in enumerate(values)]
        return dict(zip(values, zip(self.shapes, places, strict=True), strict=True))

    def masks(self) -> list[Tensor]:
        """Return what is kept: bool tensors of the weights' shapes, on their devices."""
        masks = []
        for index, shape in enumerate(self.shapes):
            values = self.values(index)
            mask = torch.zeros(shape.numel(), dtype=torch.bool, device=values.device)
            mask[self._positions_on(index, values.device)] = True
            masks.append(mask.view(shape))
        return masks

    def metrics(self, example: Tensor) -> dict[str, float]:
        """See `Compression.metrics`: the health of the masks."""
        return metrics_of(self, self.masks(), example)

    def set_masks(self, masks: Sequence[Tensor], optimizer: Optimizer | None = None) -> None:
        """Change what is kept. Values that stay are the same; new ones are zero.

        Args:
            masks: Bool tensor of each weight's shape.
            optimizer: Its state for the values (momentum, moments) moves along, as gradients
                do: zero for positions that are new.
        """
        moves: dict[int, Tensor] = {}
        for index, mask in enumerate(masks):
            new = mask.reshape(-1).nonzero().squeeze(1)
            if not torch.equal(new, self._positions_on(index, new.device)):
                moves[index] = new
        if not moves:
            return
        if optimizer is not None:
            check_movable(optimizer, [self.values(index) for index in moves])
        self._leave_copies_behind()
        for index, new in moves.items():
            self._move(index, new, optimizer)
        self.structure_version += 1
        self._catch_up()

    def before_step(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Take note of who trains: when a state dict moves the values, its state moves along."""
        del step, total_steps
        self._train()
        self._state_is_loaded = False
        if self._optimizer is None or self._optimizer() is not optimizer:
            self._optimizer = ref(optimizer)
        for one in optimizers_in(optimizer):
            if one not in self._watched:
                self._watched.add(one)
                # A wrapper that lacks the hooks loads the optimizer inside, which has them.
                with suppress(AttributeError):
                    one.register_load_state_dict_post_hook(partial(_note_load, ref(self)))
                    one.register_step_post_hook(partial(_note_step, ref(self)))

    def watch_gradients(self, watch: bool) -> None:
        """Sum up the gradients of the dense weights from now on, or drop them."""
        self._gradients = [None for _ in self.shapes] if watch else None

    def dense_gradients(self) -> list[Tensor] | None:
        """Return this process's summed gradients of the dense weights.

        `None` unless they are watched. A weight without a gradient has zeros.
        """
        if self._gradients is None:
            return None
        return [
            torch.zeros(shape, dtype=self.dtype, device=self.values(index).device)
            if gradient is None
            else gradient
            for index, (shape, gradient) in enumerate(
                zip(self.shapes, self._gradients, strict=True)
            )
        ]

    @property
    def counts(self) -> list[int]:
        """Number of kept values of each weight."""
        return [len(positions) for positions in self.positions]

    @property
    def num_values(self) -> int:
        """Number of kept values."""
        return sum(self.counts)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index in an artifact; see `index_bytes`."""
        if self.strategy.coding != "none":
            return tensor_bytes(self.index_tensors().values())
        return FINGERPRINT_BYTES if self.draw else index_bytes(self.counts, self.shapes)

    @property
    def index_format(self) -> str:
        """The formats in use, each with its number of weights; or "seed", or "gaps"."""
        if self.draw:
            return "seed"
        is_coded = self.strategy.coding != "none" and CODED in self.index_tensors()
        return "gaps" if is_coded else index_format(self.counts, self.shapes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the positions, which stay in memory while training."""
        return sum(positions.numel() * positions.itemsize for positions in self.positions)

    def stored_values(self) -> dict[str, list[nn.Parameter]]:
        """See `Compression.stored_values`; one vector, in the order of the weights."""
        return {VALUES: [self.values(index) for index in range(len(self.shapes))]}

    def value_tensors(self) -> dict[str, Tensor]:
        """See `Compression.value_tensors`."""
        self._check_copies()
        return super().value_tensors()

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        if self.draw:
            return {FINGERPRINT: torch.tensor(self._fingerprint(), dtype=torch.int64)}
        return pack(self.positions, self.shapes, self.strategy.coding)

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: counts, packed positions, and whose they are."""
        self._check_copies()
        index = pack(self.positions, self.shapes)
        return {**index, MARKS: self.marks(*index.values())}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """See `Compression.adopt`.

        Raises:
            InputError: The structure is damaged, of other weights, of another strategy, seed or
                ratio, or does not follow from this strategy's seed where an artifact says that it
                does; or the values that come with it are an average over several structures.
        """
        masks = [
            m.to(self.values(i).device) for i, m in enumerate(masks_of(structure, self.shapes))
        ]
        if MARKS in structure:
            marks = self.marks(structure[COUNTS], structure[INDEX])
            check_marks(structure[MARKS], marks, self.strategy)
        drawn = chain([self.masks()], self.draw()) if self.draw else [masks]
        if not any(_are_same(masks, others) for others in drawn):
            raise InputError(
                f"these positions belong to another seed, ratio or strategy than {self.strategy}"
            )
        optimizer = None if self._optimizer is None else self._optimizer()
        # A state that was loaded since the last step belongs to the positions that come now.
        self.set_masks(masks, None if self._state_is_loaded else optimizer)
        self._catch_up()

    def split(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return each weight's values out of an artifact's tensors.

        Raises:
            InputError: They are missing or do not fit.
        """
        values = self.values_in(tensors, VALUES)
        if not self.has_fingerprint(tensors):
            raise InputError(
                f"the artifact's {FINGERPRINT} does not belong to the positions that "
                f"{self.strategy.name} draws from its seed"
            )
        # Each with memory of its own, and its own count of changes.
        return [part.clone() for part in values.split(self.counts)]

    def has_fingerprint(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether an artifact's tensors belong to these positions, as far as they tell."""
        if not self.draw:
            return True
        return is_fingerprint(tensors.get(FINGERPRINT), self._fingerprint())

    def _positions_on(self, index: int, device: torch.device) -> Tensor:
        if self.positions[index].device != device:
            self.positions[index] = self.positions[index].to(device)
        return self.positions[index]

    def _add_gradient(self, index: int, gradient: Tensor) -> None:
        if self._gradients is not None:
            known = self._gradients[index]
            self._gradients[index] = gradient.clone() if known is None else known + gradient

    @torch.no_grad()
    def _move(self, index: int, new: Tensor, optimizer: Optimizer | None) -> None:
        values = self.values(index)
        old = self._positions_on(index, values.device)
        new = new.to(values.device)

        def moved(tensor: Tensor) -> Tensor:
            dense = tensor.new_zeros(self.shapes[index].numel())
            return dense.index_copy_(0, old.to(tensor.device), tensor)[new.to(tensor.device)]

        if optimizer is not None:
            move_state(optimizer, values, moved)
        # The same parameter object: optimizers and DDP go on knowing it.
        gradient, values.grad = values.grad, None
        values.data = in_bucket_of(values.data, moved(values.data))
        values.grad = None if gradient is None else in_bucket_of(gradient, moved(gradient))
        self.positions[index] = new
        increment_version(values)  # a graph that has saved them cannot go on with these
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this object's own training."""
        state = super().__getstate__() | {"_optimizer": None, "_layouts": {}}
        del state["_watched"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch no optimizer yet."""
        super().__setstate__(state)
        self._watched = WeakSet()

    def _fingerprint(self) -> int:
        return fingerprint("kept", *self.positions, *(str(tuple(shape)) for shape in self.shapes))


class _KeptSource(PartSource):
    """What a module multiplies with, where that is cheaper without computing its weight."""

    compression: SparseWeights

    def product(self, inputs: Tensor) -> Tensor | None:
        """See `ProductSource.product`."""
        return self.compression.product(self.index, inputs)


def _are_same(masks: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = zip(masks, others, strict=True)
    return all(torch.equal(mask.cpu(), other.cpu()) for mask, other in pairs)


def _note_load(sparse: "ref[SparseWeights]", optimizer: Optimizer) -> None:
    del optimizer
    found = sparse()
    if found is not None:
        found._state_is_loaded = True


def _note_step(sparse: "ref[SparseWeights]", *_: object) -> None:
    found = sparse()
    if found is not None:
        found._note_values()
