"""Computed weights that refuse to be written: what is written there would be lost."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from memfold.errors import InputError

__all__ = ["ReadOnlyWeight", "refuse"]

_ALLOWED = ("requires_grad_", "detach_", "share_memory_", "rename_", "apply_", "map_", "map2_")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITES = (
    "__setitem__",
    *(f"__i{operator}__" for operator in _OPERATORS),
    *(n for n in dir(Tensor) if n[0] != "_" and n.endswith("_") and n not in _ALLOWED),
)
_VIEWS = (
    *("__getitem__", "detach", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"),
    *("t", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "narrow", "select"),
    *("diagonal", "unbind", "chunk", "split", "expand", "contiguous"),
)


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


def _view(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def view(weight: ReadOnlyWeight, *args: Any, **options: Any) -> Any:
        found = method(weight, *args, **options)
        for part in found if isinstance(found, tuple) else (found,):
            if type(part) is Tensor and (part._is_view() or method is Tensor.detach):
                part.memfold_name = weight.memfold_name  # type: ignore[attr-defined]
                _become(part, ReadOnlyWeight)
        return found

    return view


for _name in _WRITES:
    setattr(ReadOnlyWeight, _name, _refuse)
for _name in _VIEWS:
    setattr(ReadOnlyWeight, _name, _view(getattr(Tensor, _name)))
for _name in ("T", "mT"):
    setattr(ReadOnlyWeight, _name, property(_view(getattr(Tensor, _name).__get__)))
