"""Parameters that are computed when they are read.

A module keeps its own code: wherever it reads `self.weight` (or a parent reads
`self.out_proj.weight`, a functional call `self.embed.weight`), the attribute is computed instead
of stored. This needs a property on the class, so the module's class is replaced by a subclass of
it with the same name; `isinstance`, `repr`, `copy.deepcopy` and pickling work as before.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from memfold.compression.read_only import ReadOnlyWeight, refuse
from memfold.compression.transforms import is_transformed
from memfold.errors import InputError

__all__ = [
    "ProductSource",
    "WeightSource",
    "check_computable",
    "compute_parameters",
    "computed_sources",
    "restore_weights",
]

_SOURCES = "_memfold_sources"
_ORDER = "_memfold_parameter_order"
_BASE = "_memfold_base_class"
_POINTWISE = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class WeightSource(Protocol):
    """What computes a weight; copied and pickled with the module that reads it."""

    @property
    def root(self) -> nn.Module:
        """The module that holds the values."""
        ...

    @property
    def name(self) -> str:
        """State-dict name of the weight in the dense model."""
        ...

    def __call__(self) -> Tensor:
        """Compute the weight."""
        ...

    def convert(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow what `.to()`, `.half()` and their like do to tensors of the module."""
        ...


@runtime_checkable
class ProductSource(WeightSource, Protocol):
    """A source that may know how to multiply with its weight without computing it."""

    def product(self, inputs: Tensor) -> Tensor | None:
        """Multiply the last dimension of `inputs` with the transposed weight, (rows, columns).

        A weight of more dimensions is flattened behind the first. `None` where the weight had
        better be computed. Inputs are plain dense tensors of one dimension or more, and no
        transform of PyTorch's sees them.
        """
        ...


def compute_parameters(module: nn.Module, sources: Mapping[str, WeightSource]) -> None:
    """Replace parameters of `module`, in place, by attributes computed from `sources`.

    Args:
        module: Owner of the parameters, which `check_computable` has accepted; a module is
            rewritten once, with all its sources.
        sources: Attribute name -> what computes the tensor to use in its place.
    """
    base = type(module)
    multiplies = isinstance(sources.get("weight"), ProductSource)
    computed = _computed_class(base, tuple(sources), multiplies)
    module.__dict__[_BASE] = base
    module.__dict__[_ORDER] = tuple(module._parameters)
    module.__dict__[_SOURCES] = dict(sources)
    for name in sources:
        del module._parameters[name]
    if isinstance(module, nn.RNNBase):
        # The list of dense weights that RNNBase keeps beside its parameters.
        module.__dict__.pop("_flat_weights", None)
        module.__dict__["_flat_weight_refs"] = []
    _set_class(module, computed)


def computed_sources(module: nn.Module) -> Collection[WeightSource]:
    """Return what computes the weights of this very module."""
    return vars(module).get(_SOURCES, {}).values()


def restore_weights(
    weights: Sequence[nn.Parameter], places: Sequence[Sequence[tuple[nn.Module, str]]]
) -> None:
    """Undo `compute_parameters` wherever these weights are read: the original classes.

    Args:
        weights: Dense parameters, for all sources of every module.
        places: Modules and attributes that hold each of them.
    """
    parameters: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for weight, owners in zip(weights, places, strict=True):
        for module, attribute in owners:
            parameters.setdefault(module, {})[attribute] = weight
    for module, own in parameters.items():
        _restore(module, own)


def _restore(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    order: tuple[str, ...] = module.__dict__.pop(_ORDER)
    del module.__dict__[_SOURCES]
    _set_class(module, module.__dict__.pop(_BASE))
    present = {**module._parameters, **parameters}
    module._parameters.clear()
    for name in (*order, *present):
        if name in present:
            module._parameters[name] = present[name]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def check_computable(module: nn.Module, attributes: Collection[str], path: str) -> None:
    """Check that `compute_parameters` can rewrite this module.

    Args:
        module: Owner of the parameters.
        attributes: Their names in it.
        path: Its name in the model.

    Raises:
        InputError: The module is compiled or traced code, its class cannot be derived from, or it
            changes its weight in place.
    """
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        raise InputError(
            f"{path or kind} cannot be compressed: {kind} is compiled code; compress the model "
            "before it is scripted or traced, or add it to compression.exclude"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise InputError(
            f"{path or kind} cannot be compressed: {kind}(max_norm={module.max_norm}) rewrites "
            "its rows in place; add it to compression.exclude or drop max_norm"
        )
    try:
        _computed_class(type(module), tuple(attributes), False)
    except Exception as error:  # whatever the class's own machinery raises
        raise InputError(
            f"{path or kind} cannot be compressed: no class can be derived from {kind} ({error}); "
            "add it to compression.exclude"
        ) from error


def _set_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls


def _read(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        source = module.__dict__[_SOURCES][name]
        try:
            weight = source()
        except AttributeError as error:
            # nn.Module would report a missing attribute and hide the reason.
            raise RuntimeError(f"{type(module).__name__}.{name}: {error}") from error
        # In a compiled graph nothing is left of Python's ways to write. No call here: PyTorch's
        # compiler would take the callee for a frame to compile, and its class for a constant.
        if not torch.compiler.is_compiling() and type(weight) is Tensor:
            weight.memfold_name = source.name  # type: ignore[attr-defined]
            weight.__class__ = ReadOnlyWeight
        return weight

    def write(module: nn.Module, _: object) -> None:
        refuse(module.__dict__[_SOURCES][name].name)

    return property(read, write, doc=f"Computed `{name}`.")


def _rebuild(base: type[nn.Module], names: tuple[str, ...], multiplies: bool) -> nn.Module:
    return nn.Module.__new__(_computed_class(base, names, multiplies))


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    # A class made at run time cannot be found by its name: store how to make it.
    sources = module.__dict__[_SOURCES]
    multiplies = isinstance(sources.get("weight"), ProductSource)
    arguments = (module.__dict__[_BASE], tuple(sources), multiplies)
    return _rebuild, arguments, module.__getstate__()


@cache
def _computed_class(base: type[nn.Module], names: tuple[str, ...], multiplies: bool) -> type:
    members: dict[str, Any] = {name: _read(name) for name in names}
    members |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "_apply": _apply,
    }
    if issubclass(base, nn.RNNBase):
        members |= {
            # forward() passes this list to the kernel; everything else would refresh a copy.
            "_flat_weights": property(_flat_weights),
            "_init_flat_weights": _do_nothing,
            "_update_flat_weights": _do_nothing,
            "flatten_parameters": _do_nothing,
            "__setstate__": nn.Module.__setstate__,
        }
    if multiplies and base.forward is nn.Linear.forward:
        members["forward"] = _linear
    if multiplies and base.forward in _POINTWISE:
        members["forward"] = _convolution
    return type(base.__name__, (base,), members)


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    for source in computed_sources(module):
        source.convert(change)
    return module.__dict__[_BASE]._apply(module, change, recurse)


def _refuse_script(module: nn.Module) -> NoReturn:
    raise InputError(
        "torch.jit.script knows no computed weights: script memfold.densify(model) instead"
    )


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    """Do what `nn.Linear.forward` does; the argument has the name that it has there."""
    output = _product(module, input)
    if output is None:
        return F.linear(input, module.weight, module.bias)
    return output if module.bias is None else output.add_(module.bias)


def _convolution(module: nn.Conv2d, input: Tensor) -> Tensor:
    """Do what the forward of a convolution does; one of size 1 is a product at every place."""
    if not _is_pointwise(module, input):
        return module._conv_forward(input, module.weight, module.bias)
    places = (slice(None, None, step) for step in module.stride)
    strided = input[(slice(None), slice(None), *places)]
    output = _product(module, strided.movedim(1, -1))
    if output is None:
        return module._conv_forward(input, module.weight, module.bias)
    if module.bias is not None:
        output.add_(module.bias)
    channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return output.movedim(-1, 1).clone(memory_format=layout)


def _product(module: nn.Module, inputs: Tensor) -> Tensor | None:
    """Multiply without the weight, where the source can and had better do so."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    is_plain = type(inputs) in (Tensor, nn.Parameter, ReadOnlyWeight)
    if not is_plain or inputs.layout != torch.strided or inputs.dim() == 0 or inputs.is_nested:
        return None
    return None if is_transformed(inputs) else module.__dict__[_SOURCES]["weight"].product(inputs)


def _is_pointwise(module: nn.Conv2d, input: Tensor) -> bool:
    return (
        module.groups == 1
        and all(size == 1 for size in module.kernel_size)
        and all(padding == 0 for padding in module.padding)
        and input.dim() == len(module.kernel_size) + 2
    )


def _flat_weights(module: nn.RNNBase) -> list[Tensor]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _do_nothing(module: nn.RNNBase) -> None:
    """Stand in for the upkeep of a weight list that is computed."""
