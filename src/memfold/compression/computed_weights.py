"""Weights that are computed from trained tensors of their own, which live beside them.

The tensor `conv.weight` gives way to parameters `conv.weight_values`, `conv.weight_left`, ... on
the same module, and every place that reads `conv.weight` computes it from them. A tied weight has
its parameters at its first owner.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.compression import Compression, check_still_there
from memfold.compression.computed_attributes import compute_parameters, restore_weights
from memfold.compression.marks import check_marks, check_names, identity_of, marks_of
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Strategy
from memfold.errors import InputError

__all__ = ["MARKS", "ComputedWeights"]

MARKS = "compression_marks"
"""Name in state dicts that older versions did not have."""


class _Source:
    """What a module computes its weight with: a callable that copies and pickles."""

    def __init__(self, compression: "ComputedWeights", index: int) -> None:
        self.compression = compression
        self.index = index

    @property
    def root(self) -> nn.Module:
        return self.compression.model

    @property
    def name(self) -> str:
        return self.compression.names[self.index]

    def __call__(self) -> Tensor:
        return self.compression.weight(self.index)

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """Nothing is left to do: the parts lie in the module, which has converted them."""


class ComputedWeights(Compression):
    """Compression whose weight number i is a function of a few parameters of its own."""

    root_names: ClassVar[tuple[str, ...]] = ()
    """Further names in state dicts and artifacts that no attribute of the root may have."""

    def __init__(
        self, strategy: Strategy, model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        super().__init__(strategy, model, weights)
        self.places = [[(o.module, o.attribute) for o in weight.owners] for weight in weights]
        self._handles: tuple[Any, ...] = ()

    @abstractmethod
    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`, differentiable in its parts."""

    @abstractmethod
    def part_names(self) -> tuple[str, ...]:
        """What is appended to a weight's name for each of its parts: ("values",), ..."""

    def attach(self, parts: Sequence[Mapping[str, Tensor]], *, trainable: bool = True) -> None:
        """Register each weight's parts and turn the dense parameters into computed attributes.

        Nothing here fails once `check_parts` has passed.
        """
        sources: dict[nn.Module, dict[str, _Source]] = {}
        for index, places in enumerate(self.places):
            for module, attribute in places:
                sources.setdefault(module, {})[attribute] = _Source(self, index)
        for module, computed in sources.items():
            compute_parameters(module, computed)
        for index, tensors in enumerate(parts):
            module, attribute = self.places[index][0]
            for name, tensor in tensors.items():
                parameter = nn.Parameter(tensor, requires_grad=trainable)
                module.register_parameter(f"{attribute}_{name}", parameter)
        self._handles = (
            # PyTorch marks this hook with an attribute, which a bound method cannot take.
            self.model.register_state_dict_post_hook(partial(self._save_structure)),
            self.model.register_load_state_dict_pre_hook(self._load_structure),
        )

    def check_parts(self) -> None:
        """Check that the names of the parts are free, and those that the root needs.

        Raises:
            InputError: A module has an attribute of that name.
        """
        for name in (*self.root_names, MARKS):
            if hasattr(self.model, name):
                raise InputError(f"the model has an attribute {name}, which the compression needs")
        for name, places in zip(self.names, self.places, strict=True):
            module, attribute = places[0]
            for part in self.part_names():
                if hasattr(module, f"{attribute}_{part}"):
                    raise InputError(f"{name}_{part} exists: the compression needs that name")

    def part(self, index: int, name: str) -> nn.Parameter:
        """Return one part of weight number `index`."""
        module, attribute = self.places[index][0]
        return getattr(module, f"{attribute}_{name}")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts, and of every weight computed from them."""
        return self.part(0, self.part_names()[0]).dtype

    def owned_names(self) -> frozenset[str]:
        """See `Compression.owned_names`."""
        parts = {
            id(self.part(index, name))
            for index in range(len(self.names))
            for name in self.part_names()
        }
        state = self.model.state_dict(keep_vars=True)
        names = {name for name, tensor in state.items() if id(tensor) in parts}
        return frozenset(names | self.structure().keys())

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: what tells whether values belong to these weights."""
        return {MARKS: self.marks()} if self.names else {}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Check that values of another rank or a checkpoint belong to these weights.

        State dicts of older versions have no marks, and are not checked.

        Raises:
            InputError: They are of another strategy, seed, ratio or set of weights, or an average
                of values that belong to different positions.
        """
        if MARKS in structure:
            check_marks(structure[MARKS], self.marks(), self.strategy)

    def check_places(self) -> None:
        """See `Compression.check_places`."""
        check_still_there(self.model, self.names, self.places)

    def restore_dense(self) -> None:
        """See `Compression.restore_dense`."""
        for handle in self._handles:
            handle.remove()
        names = self.part_names()
        with torch.no_grad():
            trains = [self.part(index, names[0]).requires_grad for index in range(len(self.names))]
            built = [self.weight(index) for index in range(len(self.names))]
        weights = [nn.Parameter(w, requires_grad=t) for w, t in zip(built, trains, strict=True)]
        for places in self.places:
            module, attribute = places[0]
            for name in names:
                del module._parameters[f"{attribute}_{name}"]
        restore_weights(weights, self.places)

    def marks(self, *places: Tensor) -> Tensor:
        """Return the marks of values of these weights that lie where `places` says."""
        shapes = zip(self.names, self.shapes, strict=True)
        weights = (f"{name}{tuple(shape)}" for name, shape in shapes)
        digests = (blake2b(place.cpu().numpy().tobytes()).hexdigest() for place in places)
        return marks_of(identity_of(self.strategy), *weights, *digests)

    def _save_structure(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        state.update({prefix + name: tensor for name, tensor in self.structure().items()})

    def _load_structure(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_messages: list[str],
    ) -> None:
        check_names(state, prefix, MARKS)
        names = self.structure().keys()
        # A copy is a tensor also where Lightning gives a stand-in, which it reads when it is used.
        found = {
            name: torch.clone(state.pop(prefix + name)) for name in names if prefix + name in state
        }
        missing = [prefix + name for name in names if name not in found and name != MARKS]
        missing_keys += missing
        parts = self.owned_names() - names
        try:
            if found and not missing:
                self.adopt(found)
            elif missing and any(prefix + name in state for name in parts):
                raise InputError(
                    f"values came without {', '.join(missing)}: nothing tells where they belong"
                )
        except InputError as error:
            error_messages.append(str(error))
            # The model loads itself, so that it stays as it is and nothing else is reported.
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
            own = module.state_dict(keep_vars=True).items()
            state.update({prefix + name: tensor for name, tensor in own if name not in names})
