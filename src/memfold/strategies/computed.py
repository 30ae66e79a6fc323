"""Parameters that are computed when they are read.

A module keeps its own code: wherever it reads `self.weight` (or a parent reads
`self.out_proj.weight`, a functional call `self.embed.weight`), the attribute is computed instead
of stored. This needs a property on the class, so the module's class is replaced by a subclass of
it with the same name; `isinstance`, `repr`, `copy.deepcopy` and pickling work as before.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from memfold.errors import InputError

__all__ = ["check_computable", "compute_parameters", "restore_parameters"]

_SOURCES = "_memfold_sources"
_ORDER = "_memfold_parameter_order"


def compute_parameters(module: nn.Module, sources: Mapping[str, Callable[[], Tensor]]) -> None:
    """Replace parameters of `module`, in place, by attributes computed from `sources`.

    Args:
        module: Owner of the parameters; a module is rewritten once, with all its sources.
        sources: Attribute name to a callable that returns the tensor to use in its place. The
            callables are copied and pickled with the module.
    """
    base = type(module)
    module.__dict__[_ORDER] = tuple(module._parameters)
    module.__dict__[_SOURCES] = dict(sources)
    for name in sources:
        del module._parameters[name]
    if isinstance(module, nn.RNNBase):
        # The list of dense weights that RNNBase keeps beside its parameters.
        module.__dict__.pop("_flat_weights", None)
        module.__dict__["_flat_weight_refs"] = []
    _set_class(module, _computed_class(base, tuple(sources)))


def restore_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Undo `compute_parameters`: the original class, with `parameters` in their old places."""
    order: tuple[str, ...] = module.__dict__.pop(_ORDER)
    del module.__dict__[_SOURCES]
    _set_class(module, type(module).__mro__[1])
    others = dict(module._parameters)
    module._parameters.clear()
    for name in order:
        module._parameters[name] = parameters[name] if name in parameters else others.pop(name)
    module._parameters.update(others)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def check_computable(module: nn.Module, name: str) -> None:
    """Check that `compute_parameters` can rewrite this module.

    Raises:
        InputError: The module is a compiled script, or changes its weight in place.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"{name} cannot be compressed: {type(module).__name__} is compiled code; compress the "
            "model before torch.jit, or add it to compression.exclude"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise InputError(
            f"{name} cannot be compressed: {type(module).__name__}(max_norm={module.max_norm}) "
            "rewrites its rows in place; add it to compression.exclude or drop max_norm"
        )


def _set_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls


def _read(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        try:
            return module.__dict__[_SOURCES][name]()
        except AttributeError as error:
            # nn.Module would report a missing attribute and hide the reason.
            raise RuntimeError(f"{type(module).__name__}.{name}: {error}") from error

    return property(read, doc=f"Computed `{name}`.")


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return nn.Module.__new__(_computed_class(base, names))


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    # A class made at run time cannot be found by its name: store how to make it.
    return (
        _rebuild,
        (type(module).__mro__[1], tuple(module.__dict__[_SOURCES])),
        dict(module.__dict__),
    )


@cache
def _computed_class(base: type[nn.Module], names: tuple[str, ...]) -> type:
    members: dict[str, Any] = {name: _read(name) for name in names}
    members |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce__": _reduce,
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
    return type(base.__name__, (base,), members)


def _flat_weights(module: nn.RNNBase) -> list[Tensor]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _do_nothing(module: nn.RNNBase) -> None:
    """Stand in for the upkeep of a weight list that is computed."""
