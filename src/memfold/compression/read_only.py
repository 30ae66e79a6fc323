"""Computed weights that refuse to be written: what is written there would be lost."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from memfold.errors import InputError

__all__ = ["ReadOnlyWeight", "refuse"]

_ALLOWED = ("requires_grad_", "detach_", "share_memory_", "rename_")
_OPERATORS = (
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_WRITES = (
    "__setitem__",
    *(f"__i{operator}__" for operator in _OPERATORS),
    *(n for n in dir(Tensor) if n[0] != "_" and n.endswith("_") and n not in _ALLOWED),
)
_WAY_OUT = "as_subclass"  # gives the plain tensor, for what has to have one
_METHODS = (
    "__getitem__",
    *(n for n in dir(Tensor) if n[0] != "_" and n[-1] != "_" and callable(getattr(Tensor, n))),
)
_PROPERTIES = ("T", "H", "mT", "mH", "real", "imag")


class _AnyTensor(type(Tensor)):
    def __instancecheck__(cls, instance: object) -> bool:
        # torch.testing compares two tensors where one is an instance of the other's class.
        return isinstance(instance, Tensor)


class ReadOnlyWeight(Tensor, metaclass=_AnyTensor):
    """A computed weight. Python's ways to write into it, or into a view of it, raise.

    Operations see a plain tensor and give plain tensors, as they do for `nn.Parameter`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    memfold_name: str
    """State-dict name of the weight, for the message."""

    # What nn.Parameter sets on the view that it makes of such a weight, which is then a parameter.
    _is_param = property(lambda _: False, lambda weight, _: _become(weight, nn.Parameter))  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The numbers without a graph, read-only as well."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        _refuse(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def refuse(name: str) -> NoReturn:
    """Say that this weight cannot be written.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"{name} is computed from trained values, and what is written to it would be lost: write "
        "to the weights of memfold.densify(model), or leave the layer out with compression.exclude"
    )


def _refuse(weight: ReadOnlyWeight, *_: object, **__: object) -> NoReturn:
    refuse(weight.memfold_name)


def _become(weight: Tensor, cls: type[Tensor]) -> None:
    weight.__class__ = cls


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let what `method` returns be read-only too, where it lies in the weight's memory."""

    @wraps(method)
    def read(weight: ReadOnlyWeight, *args: Any, **options: Any) -> Any:
        found = method(weight, *args, **options)
        for part in found if isinstance(found, tuple | list) else (found,):
            if type(part) is Tensor and _is_in(part, weight):
                part.memfold_name = weight.memfold_name  # type: ignore[attr-defined]
                _become(part, ReadOnlyWeight)
        return found

    return read


def _is_in(part: Tensor, weight: Tensor) -> bool:
    # Inference mode tells of no views; what torch.func passes around has no memory of its own.
    has_memory = torch._C._has_storage(part)
    return part._is_view() or (has_memory and torch._C._is_alias_of(part, weight))  # type: ignore[attr-defined]


for _name in _WRITES:
    setattr(ReadOnlyWeight, _name, _refuse)
for _name in _METHODS:
    if _name != _WAY_OUT:
        setattr(ReadOnlyWeight, _name, _reading(getattr(Tensor, _name)))
for _name in _PROPERTIES:
    setattr(ReadOnlyWeight, _name, property(_reading(getattr(Tensor, _name).__get__)))
