"""Weights that are computed from trained tensors, their parts.

A part belongs to one weight, to a group of weights, or to the whole model. The tensor `conv.weight`
gives way to parameters `conv.weight_values`, `conv.weight_left`, ... on the same module, and every
place that reads `conv.weight` computes it from them. A tied weight has its parts at its first
owner, a group at its first weight. A part of the model lies on the root, under its own name.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.compressed_model import check_still_there
from memfold.compression.computed_attributes import (
    WeightSource,
    compute_parameters,
    restore_weights,
)
from memfold.compression.fingerprints import (
    check_marks,
    check_names,
    fingerprint,
    identity_of,
    marks_of,
)
from memfold.compression.kept_weights import KeptWeights
from memfold.compression.selection import CompressibleWeight
from memfold.compression.state import Compression
from memfold.compression.strategy import Strategy
from memfold.compression.transforms import is_transformed
from memfold.errors import InputError

__all__ = ["MARKS", "ComputedWeights", "Level", "PartSource"]

Level = Literal["weight", "group", "model"]

MARKS = "compression_marks"
"""Name in state dicts that older versions did not have."""


class PartSource:
    """What a module computes its weight with: a callable that copies and pickles."""

    def __init__(self, compression: "ComputedWeights", index: int) -> None:
        self.compression = compression
        self.index = index

    @property
    def root(self) -> nn.Module:
        """See `WeightSource.root`."""
        return self.compression.model

    @property
    def name(self) -> str:
        """See `WeightSource.name`."""
        return self.compression.names[self.index]

    def __call__(self) -> Tensor:
        """See `WeightSource.__call__`."""
        return self.compression.current_weight(self.index)

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """Nothing is left to do: the parts lie in the model, which has converted them."""


class ComputedWeights(Compression):
    """Compression whose weight number i is a function of a few parts."""

    parts: Mapping[str, Level]
    """Name of a part -> what has one: each weight, each group of weights, or the model. The first
    has the dtype that every weight is computed in."""
    root_names: ClassVar[tuple[str, ...]] = ()
    """Further names in state dicts and artifacts that no attribute of the root may have."""
    mark: ClassVar[str] = MARKS
    """Name in state dicts of what tells whose values these are."""

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        *,
        groups: Iterable[Sequence[int]] = (),
        whole: Collection[int] = (),
    ) -> None:
        """Take note of the weights; `attach` then replaces them.

        Args:
            strategy: Which one compresses.
            model: The root module.
            weights: The compressible weights.
            groups: Numbers of weights that share parts; a weight in none is one of its own.
            whole: Numbers of weights that stay dense parameters, without parts.

        Raises:
            InputError: The name of a part, or one that the root needs, is taken.
        """
        super().__init__(strategy, model, weights)
        self.places = [[(o.module, o.attribute) for o in weight.owners] for weight in weights]
        self.computed = [index for index in range(len(weights)) if index not in whole]
        self._firsts = {index: group[0] for group in groups for index in group}
        self._handles: tuple[Any, ...] = ()
        self._kept = KeptWeights()
        self._check_names()

    @abstractmethod
    def weight(self, index: int) -> Tensor:
        """Compute dense weight number `index`, differentiable in its parts, none of which it is."""

    def current_weight(self, index: int) -> Tensor:
        """Return weight number `index`; in evaluation that of the batch before, if it is the same.

        In evaluation: without gradients, the model in `eval()` mode.
        """
        if torch.compiler.is_compiling():
            return self.weight(index)
        parts = [self.part(index, name) for name in self.parts]
        transformed = any(map(is_transformed, parts))
        if torch.is_grad_enabled() or self.model.training or transformed:
            self._kept.clear()
            return self.weight(index)
        return self._kept.weight(index, parts, partial(self.weight, index))

    def release(self) -> None:
        """See `Compression.release`: the weights that an evaluation has kept."""
        self._kept.clear()

    def first(self, index: int) -> int:
        """Return the first weight of the group of weight number `index`, which may be itself."""
        return self._firsts.get(index, index)

    def home(self, index: int, name: str) -> tuple[nn.Module, str]:
        """Return the module of a part of weight number `index`, and its attribute there."""
        level = self.parts[name]
        if level == "model":
            return self.model, name
        first = self.first(index) if level == "group" else index
        module, attribute = self.places[first][0]
        return module, f"{attribute}_{name}"

    def part(self, index: int, name: str) -> nn.Parameter:
        """Return one part of weight number `index`."""
        module, attribute = self.home(index, name)
        return getattr(module, attribute)

    def part_tensors(self) -> Iterator[nn.Parameter]:
        """Yield every part once, weight after weight."""
        return (getattr(module, attribute) for _, module, attribute in self._homes())

    def source(self, index: int, module: nn.Module) -> WeightSource:
        """Return what `module` computes weight number `index` with."""
        del module
        return PartSource(self, index)

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """Register the parts and turn the dense parameters into computed attributes.

        Args:
            parts: Name -> one tensor for each weight, each group in the order of their first
                weights, or the model. Those that are in no `parts` are left out.

        Raises:
            ValueError: Of some there are more or fewer; the model is unchanged.
        """
        given = {name: list(parts[name]) for name in self.parts}
        needed = Counter(name for name, _, _ in self._homes())
        for name, tensors in given.items():
            if len(tensors) != needed[name]:
                raise ValueError(f"{len(tensors)} tensors of {name} are given, not {needed[name]}")
        sources: dict[nn.Module, dict[str, WeightSource]] = {}
        for index in self.computed:
            for module, attribute in self.places[index]:
                sources.setdefault(module, {})[attribute] = self.source(index, module)
        for module, computed in sources.items():
            compute_parameters(module, computed)
        left = {name: iter(tensors) for name, tensors in given.items()}
        for name, module, attribute in self._homes():
            module.register_parameter(attribute, nn.Parameter(next(left[name])))
        self._handles = (
            # PyTorch marks this hook with an attribute, which a bound method cannot take.
            self.model.register_state_dict_post_hook(partial(self._save_structure)),
            self.model.register_load_state_dict_pre_hook(self._load_structure),
        )

    def dense_weights(self) -> list[Tensor]:
        """Compute the weights, each in memory of its own: all that are not whole."""
        parts = {p.untyped_storage()._cdata for p in self.part_tensors()}
        built = (self.weight(index) for index in self.computed)
        return [w.clone() if w.untyped_storage()._cdata in parts else w for w in built]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts, and of every weight computed from them."""
        return next(self.part_tensors()).dtype

    @property
    def num_values(self) -> int:
        """Numbers in all parts."""
        return sum(part.numel() for part in self.part_tensors())

    def values_in(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the tensor of that name out of an artifact's, shape (num_values,).

        Raises:
            InputError: It is missing or does not fit.
        """
        values = tensors.get(name)
        if values is None or values.shape != (self.num_values,) or not values.is_floating_point():
            raise InputError(
                f"the artifact's {name} must be {self.num_values} floating-point numbers"
            )
        return values

    def owned_names(self) -> frozenset[str]:
        """See `Compression.owned_names`."""
        return self._part_names() | self.structure().keys() | self.dense_names()

    def dense_names(self) -> frozenset[str]:
        """State-dict names that the computed weights have in the dense model, ties included.

        In a state dict of the compressed one, each names an empty tensor. Without them, the dense
        class would take the dict where it is not strict, and keep its own weights without a word;
        PyTorch refuses a tensor of another shape, strict or not.
        """
        names = {self.names[index] for index in self.computed}
        tied = (pair for pair in self.ties.items() if not names.isdisjoint(pair))
        return frozenset(names.union(*tied))

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: what tells whether values belong to these weights."""
        return {MARKS: self.marks()} if self.computed else {}

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
        first = next(iter(self.parts))
        trains = [self.part(index, first).requires_grad for index in self.computed]
        with torch.no_grad():
            built = self.dense_weights()
        weights = [nn.Parameter(w, requires_grad=t) for w, t in zip(built, trains, strict=True)]
        for _, module, attribute in self._homes():
            del module._parameters[attribute]
        restore_weights(weights, [self.places[index] for index in self.computed])

    def marks(self, *places: Tensor) -> Tensor:
        """Return the marks of values of these weights that lie where `places` says."""
        weights = (f"{self.names[index]}{tuple(self.shapes[index])}" for index in self.computed)
        return marks_of(fingerprint(identity_of(self.strategy), *weights, *places))

    def _homes(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield name, module and attribute of every part, weight after weight."""
        seen: set[tuple[nn.Module, str]] = set()
        for index in self.computed:
            for name in self.parts:
                home = self.home(index, name)
                if home not in seen:
                    seen.add(home)
                    yield (name, *home)

    def _check_names(self) -> None:
        on_root = [name for name, level in self.parts.items() if level == "model"]
        for name in (*on_root, *self.root_names, self.mark):
            if hasattr(self.model, name):
                raise InputError(f"the model has an attribute {name}, which the compression needs")
        paths = {module: path for path, module in self.model.named_modules()}
        for _, module, attribute in self._homes():
            if hasattr(module, attribute):
                name = f"{paths[module]}.{attribute}".removeprefix(".")
                raise InputError(f"{name} exists: the compression needs that name")

    def _save_structure(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        state.update({prefix + name: tensor for name, tensor in self.structure().items()})
        nothing = torch.empty(0, device="cpu")  # one for all: each would take 200 bytes of a file
        state.update({prefix + name: nothing for name in sorted(self.dense_names())})

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
        check_names(state, prefix, self.mark)
        names = self.structure().keys()
        given = {name: state.pop(prefix + name, None) for name in self.dense_names()}
        dense = [name for name, tensor in given.items() if prod(getattr(tensor, "shape", [0])) > 0]
        # A copy is a tensor also where Lightning gives a stand-in, which it reads when it is used.
        found = {
            name: torch.clone(state.pop(prefix + name)) for name in names if prefix + name in state
        }
        missing = [prefix + name for name in names if name not in found and name != MARKS]
        missing_keys += missing
        try:
            if dense:
                raise InputError(
                    f"the state dict is of a dense model (it has {prefix}{min(dense)}): load it "
                    "before memfold.compress"
                )
            if found and not missing:
                self.adopt(found)
            elif missing and any(prefix + name in state for name in self._part_names()):
                raise InputError(
                    f"values came without {', '.join(missing)}: nothing tells where they belong"
                )
        except InputError as error:
            error_messages.append(str(error))
            # The model loads itself, so that it stays as it is and nothing else is reported.
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
            own = module.state_dict(keep_vars=True).items()
            left_out = names | self.dense_names()
            state.update({prefix + name: tensor for name, tensor in own if name not in left_out})

    def _part_names(self) -> frozenset[str]:
        parts = {id(parameter) for parameter in self.part_tensors()}
        state = self.model.state_dict(keep_vars=True)
        return frozenset(name for name, tensor in state.items() if id(tensor) in parts)
