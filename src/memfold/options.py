"""Options by their annotations: whether a value fits, and what can be written for it."""

import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from math import isinf
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from memfold.errors import InputError

__all__ = [
    "Count",
    "Interval",
    "Natural",
    "NonNegative",
    "Positive",
    "Ratio",
    "Share",
    "check_arguments",
    "check_fields",
    "describe",
    "fits",
]

_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Interval:
    """The numbers that are allowed: `Annotated[float, Interval("(0, 1]")]`."""

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = self._ends
        is_above = low <= value if self.text[0] == "[" else low < value
        return is_above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        low, high = self._ends
        if not isinf(high):
            return f"in {self.text}"
        return f"of at least {low:g}" if self.text[0] == "[" else f"above {low:g}"

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)


Count = Annotated[int, Interval("[1, inf)")]
Natural = Annotated[int, Interval("[0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Positive = Annotated[float, Interval("(0, inf)")]
Ratio = Annotated[float, Interval("(0, 1]")]
Share = Annotated[float, Interval("[0, 1]")]


def check_fields(made: Any, prefix: str, *, bare: Sequence[str] = ()) -> None:
    """Check every field of a frozen dataclass against its annotation.

    Numbers of any library become plain ones, because they end in JSON and in hashes, where 5 and
    numpy.int64(5) have to be the same; what stands for a tuple becomes one.

    Args:
        made: The instance, in its `__post_init__`.
        prefix: Before the names of fields in messages.
        bare: Names that are keys as they are.

    Raises:
        InputError: A value has another type than its annotation says, or is out of its interval.
    """
    hints = _hints(type(made))
    for field in fields(made):
        given, kind = getattr(made, field.name), hints.get(field.name, Any)
        value = _plain(given, kind)
        _check(field.name if field.name in bare else f"{prefix}{field.name}", value, kind, given)
        object.__setattr__(made, field.name, value)


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], prefix: str) -> None:
    """Check what a function was called with, `locals()` where it begins, as `check_fields` does.

    Raises:
        InputError: An argument has another type than its annotation says, or is out of range.
    """
    for name, kind in _hints(function).items():
        if name in given:
            _check(f"{prefix}{name}", given[name], kind, given[name])


def fits(value: object, annotation: Any) -> bool:
    """Tell whether a plain value, or what it describes, can be of a type; in doubt it can."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        kind, *rules = arguments
        return fits(value, kind) and all(value in rule for rule in rules)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if annotation in (None, NoneType):
        return value is None
    kind = origin or annotation
    if not isinstance(kind, type) or kind in (object, Any):
        return True
    if kind in _SCALARS:
        allowed = (int, float) if kind is float else kind
        return isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (issubclass(list, kind) or kind in (tuple, set, frozenset)) and _items_fit(
            value, kind, arguments
        )
    if isinstance(value, Mapping):
        return issubclass(dict, kind)
    if isinstance(value, str):
        return issubclass(kind, PurePath | Enum)
    return _is_instance(value, kind)


def describe(annotation: Any) -> str:
    """Say what can be written for a type."""
    *first, last = dict.fromkeys(_alternatives(annotation))
    return f"{', '.join(first)} or {last}" if first else last


def _check(key: str, value: object, kind: Any, given: object) -> None:
    if not fits(value, kind):
        raise InputError(f"{key} must be {describe(kind)}, got {given!r}")


@functools.cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception:  # a name that only a type checker can resolve
        return {}


def _plain(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        return functools.reduce(_plain, arguments, value)
    kind = arguments[0] if origin is Annotated else origin or annotation
    if kind is tuple and isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, Integral):
        return int(value)
    return float(value) if kind is float and isinstance(value, Real) else value


def _items_fit(values: Sequence[Any], kind: type, arguments: tuple[Any, ...]) -> bool:
    if kind is not tuple or arguments[1:] == (...,):
        return all(fits(value, argument) for argument in arguments[:1] for value in values)
    return len(values) == len(arguments) and all(map(fits, values, arguments))


def _is_instance(value: object, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that is for type checkers only
        return True


def _alternatives(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        # A class can only be described with `_target_`: it is named where nothing else will do.
        simple = [a for a in arguments if a in _SCALARS or a is NoneType or typing.get_origin(a)]
        for argument in simple or arguments:
            yield from _alternatives(argument)
    elif origin is Annotated:
        yield " ".join((describe(arguments[0]), *map(str, arguments[1:])))
    elif origin is Literal:
        yield from map(str, arguments)
    elif annotation in (None, NoneType):
        yield "null"
    else:
        yield _SCALARS.get(annotation) or _describe_class(origin or annotation, arguments)


def _describe_class(kind: Any, arguments: tuple[Any, ...]) -> str:
    if kind is tuple and arguments and ... not in arguments:
        return f"a list of {len(arguments)} ({', '.join(map(describe, arguments))})"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and (issubclass(list, kind) or kind in (tuple, set, frozenset)):
        of = f" ({describe(arguments[0])} each)" if arguments and arguments[0] is not Any else ""
        return f"a list{of}"
    return f"a {getattr(kind, '__name__', kind)} (described with _target_)"
