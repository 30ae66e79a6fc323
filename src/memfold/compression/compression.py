"""The state that a strategy leaves on a model, and what can be asked of a model that has one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from memfold.compression.accounting import ties_of
from memfold.compression.computed_attributes import check_computable, computed_sources
from memfold.compression.materialise import check_has_values
from memfold.compression.parametrised import copy_model
from memfold.compression.selection import CompressibleWeight
from memfold.errors import InputError
from memfold.quantisation import packed_bytes

if TYPE_CHECKING:
    from memfold.compression.strategy import Strategy

__all__ = [
    "Compression",
    "before_step",
    "check_not_compressed",
    "check_replaceable",
    "check_still_there",
    "check_whole",
    "compression_of",
    "compressions_in",
    "densify",
    "restore_dense",
    "set_compression",
]

_STATE = "_memfold_compression"
# Methods of transformers models that write or replace dense weights, without a word if there are
# none.
_DENSE_ONLY = ("save_pretrained", "push_to_hub", "tie_weights", "resize_token_embeddings")


class Compression(ABC):
    """The state that a strategy leaves on a model: what replaces the compressible weights.

    It hangs on the root module as a plain attribute, so that `copy.deepcopy` and pickling take it
    along. Everything that it trains or stores is registered on the model or returned by
    `value_tensors` and `index_tensors`.
    """

    is_resizable: ClassVar[bool] = False
    """Whether a state dict that is loaded decides how many values each weight has."""

    def __init__(
        self, strategy: "Strategy", model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        self.strategy = strategy
        self.model = model
        self.names: list[str] = [weight.name for weight in weights]
        self.shapes: list[torch.Size] = [weight.shape for weight in weights]
        own = {owner.name for weight in weights for owner in weight.owners}
        self.ties = {n: first for n, first in ties_of(model).items() if {n, first} & own}
        """Of these weights in the dense model: see `ties_of`."""
        self.structure_version = 0
        """Counts the changes of structure since the model was compressed."""
        self.structured: tuple[str, ...] = ()
        """Names of the tensors that were left untouched because of their initial values."""

    @property
    def num_weights(self) -> int:
        """Number n of compressible weights."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the compressible weights in the dense model."""
        return self.num_weights * self.dtype.itemsize

    @property
    @abstractmethod
    def num_values(self) -> int:
        """Number of learned values stored in their place."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype in which the values are held."""

    @property
    def value_bytes(self) -> int:
        """Bytes of the learned values, packed with the strategy's `bits`."""
        return packed_bytes(self.num_values, self.strategy.bits, self.dtype.itemsize)

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes of everything else needed to rebuild the weights: masks, indices, scales, seeds."""

    @property
    @abstractmethod
    def index_format(self) -> str:
        """How it is stored where each value belongs: "none", "seed", "bitmask", ..."""

    @property
    def resident_bytes(self) -> int:
        """Bytes kept in training beside parameters and buffers."""
        return self.index_bytes

    @abstractmethod
    def owned_names(self) -> frozenset[str]:
        """State-dict names that hold the compressed weights; all others are untouched."""

    @abstractmethod
    def value_tensors(self) -> dict[str, Tensor]:
        """Learned values, as an artifact stores them: `value_bytes` once packed."""

    @abstractmethod
    def index_tensors(self) -> dict[str, Tensor]:
        """What an artifact stores beside the values: `index_bytes` bytes in all."""

    def dense_shapes(self) -> dict[str, torch.Size]:
        """Shapes in the dense model of untouched tensors that have another one here."""
        return {}

    def structure(self) -> dict[str, Tensor]:
        """Tensors that say where the values belong, when that is not a function of the seed."""
        return {}

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Take over the structure of another rank; the values keep their places where they can."""
        del structure

    def reach(self, parameter: Tensor) -> Tensor | None:
        """Return how far the weights move where each entry of a parameter moves by one.

        Returns:
            The square root of the summed squares over the weights, of the parameter's shape;
            `None` where an entry stands for one weight, or is not counted otherwise.
        """
        del parameter
        return None

    def prepare_step(self, step: int, total_steps: int) -> None:
        """Get ready for the forward pass of optimizer step number `step`, counted from 0."""
        del step, total_steps

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
        """See the function `before_step`."""
        del optimizer, step, total_steps

    def release(self) -> None:  # noqa: B027 (most strategies keep nothing)
        """Let go of what was kept from one evaluation batch to the next."""

    @abstractmethod
    def check_places(self) -> None:
        """Check that the model still has every compressed weight where it was.

        Raises:
            InputError: A layer was replaced after the model was compressed.
        """

    @abstractmethod
    def restore_dense(self) -> None:
        """Put plain dense parameters back, in place, and leave no trace of the compression."""


def before_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, total_steps: int
) -> None:
    """Let the strategy act between the backward pass and the optimizer's step.

    Dynamic sparse training changes its structure here, low-rank factors get their decay. Call it
    once per optimizer step, on every rank, when gradients are complete (reduced, unscaled).
    Strategies that do nothing while training ignore it. A strategy that replaces the optimizer's
    step, as RigL does where it changes the structure, leaves all gradients at `None`: optimizers
    skip such parameters.

    Args:
        model: A compressed model, or what holds one: DDP, a compiled model, a LightningModule.
        optimizer: It trains the model's parameters.
        step: Optimizer steps done before this one.
        total_steps: Optimizer steps in the whole training.

    Raises:
        InputError: There is no compressed model in `model`, or there are several; or the optimizer
            trains none of the compressed weights, which is looked at in the first step.
    """
    compression = compression_of(model)
    if compression is None:
        raise InputError(
            f"before_step: there is no compressed model in {type(model).__name__}: give it what "
            "memfold.compress returned, or a module that holds it"
        )
    if step == 0:
        _check_trains(optimizer, compression)
    compression.before_step(optimizer, step, total_steps)
    compression.prepare_step(step + 1, total_steps)


def release(model: nn.Module) -> None:
    """Let go of the dense weights that a shared model keeps from one evaluation batch to the next.

    The next pass with gradients or in training mode does it too; a copy that is only ever
    evaluated, such as an average of weights, has none.

    Args:
        model: A compressed model, or one that holds compressed models; any other is left alone.
    """
    for _, compression in compressions_in(model):
        compression.release()


def _check_trains(optimizer: torch.optim.Optimizer, compression: Compression) -> None:
    names = compression.owned_names()
    owned = {id(p) for name, p in compression.model.named_parameters() if name in names}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if owned and owned.isdisjoint(trained):
        raise InputError(
            "the optimizer trains none of the compressed weights: make it after memfold.compress, "
            "which replaces parameters"
        )


def set_compression(model: nn.Module, compression: Compression) -> None:
    """Hang a compression on the root module that it was made for."""
    model.__dict__[_STATE] = compression
    model.__dict__["_apply"] = partial(_convert, model)
    if not any(computed_sources(module) for module in model.modules()):
        return  # dense weights, as those of dense and small are
    for module in model.modules():
        for name in _DENSE_ONLY:
            if callable(getattr(type(module), name, None)):
                module.__dict__[name] = partial(_refuse, name)


def _convert(
    model: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what `nn.Module._apply` does to a whole model: layers go where the values go."""
    type(model)._apply(model, change, recurse)
    for module in model.modules():
        for source in computed_sources(module):
            source.convert(lambda values: values)
    return model


def _refuse(name: str, *arguments: object, **options: object) -> None:
    raise InputError(
        f"{name} needs dense weights, which a compressed model does not have: call it on "
        "memfold.densify(model); memfold.save(model, path) keeps the compressed one"
    )


def compressions_in(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, Compression]]:
    """Return the compressions of a model and of everything that it holds.

    Args:
        model: Any module.
        remove_duplicate: Whether a part that `model` holds at several places is named once.

    Returns:
        What comes before the names in `model`'s state dict ("", "module.", ...), and the
        compression.
    """
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    found = ((path, module.__dict__.get(_STATE)) for path, module in modules)
    return [(f"{path}." if path else "", state) for path, state in found if state is not None]


def compression_of(model: nn.Module) -> Compression | None:
    """Return the compression of a model, or of the one compressed model that it holds.

    Returns:
        `None` where there is none.

    Raises:
        InputError: The model is not compressed itself and holds several that are.
    """
    own = model.__dict__.get(_STATE)
    if own is not None:
        return own
    found = compressions_in(model)
    if len(found) > 1:
        names = ", ".join(prefix.removesuffix(".") for prefix, _ in found)
        raise InputError(
            f"{type(model).__name__} holds several compressed models ({names}): give the one that "
            "is meant"
        )
    return found[0][1] if found else None


def check_not_compressed(model: nn.Module) -> None:
    """Check that no part of a model is compressed.

    Raises:
        InputError: One is.
    """
    check_whole(model)
    for prefix, found in compressions_in(model):
        where = f"its part {prefix.removesuffix('.')!r}" if prefix else "it"
        raise InputError(f"the model is compressed already: {where} has {found.strategy}")


def check_still_there(
    model: nn.Module, names: Sequence[str], places: Sequence[Sequence[tuple[nn.Module, str]]]
) -> None:
    """Check that a model still has the modules of these weights.

    Raises:
        InputError: One was replaced.
    """
    modules = set(model.modules())
    for name, owners in zip(names, places, strict=True):
        if any(module not in modules for module, _ in owners):
            raise InputError(f"{name}: its module was replaced after the model was compressed")


def check_whole(model: nn.Module) -> None:
    """Check that the weights of a compressed model are not looked at without their values.

    Raises:
        InputError: `model` is a part of a compressed model that does not hold the values.
    """
    modules = set(model.modules())
    for path, module in model.named_modules():
        if any(source.root not in modules for source in computed_sources(module)):
            raise InputError(
                f"{path or type(model).__name__} is a part of a compressed model and its values "
                "are elsewhere: use the whole model, or memfold.densify(model) first"
            )


def densify(model: nn.Module) -> nn.Module:
    """Return a plain dense copy of `model` with the same function and state-dict names.

    The copy has the classes, parameters and ties of the backbone as its author wrote it; `model`
    stays as it is.

    Raises:
        InputError: `model` is a part of a compressed model without its values.
    """
    check_whole(model)
    dense = copy_model(model)
    restore_dense(dense)
    return dense


def restore_dense(model: nn.Module) -> None:
    """Turn a compressed model, or one that holds some, into a plain dense one, in place."""
    for module in list(model.modules()):
        compression = module.__dict__.pop(_STATE, None)
        if compression is not None:
            del module.__dict__["_apply"]
            compression.restore_dense()
            for part in module.modules():
                for name in _DENSE_ONLY:
                    part.__dict__.pop(name, None)


def check_replaceable(
    model: nn.Module,
    weights: Sequence[CompressibleWeight],
    *,
    initialises: bool = False,
) -> None:
    """Check that these weights can become computed ones with values of one kind.

    Args:
        model: The root module.
        weights: The weights to replace.
        initialises: Whether the strategy gives values to tensors on the meta device.

    Raises:
        InputError: They differ in dtype or device, have no values, or their module refuses.
    """
    if not initialises:
        check_has_values(model)
    tensors = [weight.tensor for weight in weights]
    for key, values in (
        ("dtypes", {str(t.dtype) for t in tensors}),
        ("devices", {str(t.device) for t in tensors if not t.is_meta}),
    ):
        if len(values) > 1:
            raise InputError(
                f"the compressible weights have several {key} ({', '.join(sorted(values))}); "
                "one is needed: convert the model or narrow compression.include"
            )
    attributes: dict[nn.Module, list[str]] = {}
    paths: dict[nn.Module, str] = {}
    for owner in (owner for weight in weights for owner in weight.owners):
        attributes.setdefault(owner.module, []).append(owner.attribute)
        paths[owner.module] = owner.path
    for module, names in attributes.items():
        check_computable(module, names, paths[module])
