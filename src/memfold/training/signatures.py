"""Options of a class or function against its own signature: names and types."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union

from memfold.errors import InputError

__all__ = ["check_options"]

_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_options(
    target: Callable[..., object], options: Mapping[str, Any], key: str, ready: Mapping[str, object]
) -> None:
    """Check what a configuration gives to `target`, where its signature tells.

    Args:
        target: A class or function.
        options: Plain values; names that begin with an underscore are Hydra's.
        key: Where `options` stand in the configuration, for messages.
        ready: Further arguments, which no option can set.

    Raises:
        InputError: An option is unknown, missing, or of another type than its annotation says.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (ValueError, TypeError):
        return  # built-in
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in ready
    }
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    types = _types(target)
    for name, value in options.items():
        if name.startswith("_"):
            continue
        if name not in named:
            if is_open:
                continue
            raise InputError(f"{key}.{name} is no option; options: {', '.join(named)}")
        annotation = types.get(name, Any)
        if not (_is_default(value, named[name]) or _fits(value, annotation)):
            raise InputError(f"{key}.{name} must be {_describe(annotation)}, got {value!r}")
    is_partial = "_args_" in options or options.get("_partial_")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options and not is_partial:
            raise InputError(f"{key}.{name} is missing: {key}._target_ needs it")


def _types(target: Callable[..., object]) -> dict[str, Any]:
    function = target.__init__ if isinstance(target, type) else target
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that only a type checker can resolve
        return {}


def _is_default(value: object, parameter: inspect.Parameter) -> bool:
    """Tell whether `value` is the default, which need not fit its annotation."""
    return type(value) is type(parameter.default) and value == parameter.default


def _fits(value: object, annotation: Any) -> bool:
    """Tell whether a plain value, or what it describes, can be of a type; in doubt it can."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if annotation in (None, NoneType):
        return value is None
    kind = origin or annotation
    if not isinstance(kind, type) or kind is object:
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


def _items_fit(values: Sequence[Any], kind: type, arguments: tuple[Any, ...]) -> bool:
    if kind is not tuple or arguments[1:] == (...,):
        return all(_fits(value, argument) for argument in arguments[:1] for value in values)
    return len(values) == len(arguments) and all(map(_fits, values, arguments))


def _is_instance(value: object, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that is for type checkers only
        return True


def _describe(annotation: Any) -> str:
    """Say what can be written for a type."""
    *first, last = dict.fromkeys(_alternatives(annotation))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        # A class can only be described with `_target_`: it is named where nothing else will do.
        simple = [a for a in arguments if a in _SCALARS or a is NoneType or typing.get_origin(a)]
        for argument in simple or arguments:
            yield from _alternatives(argument)
    elif origin is Literal:
        yield from map(str, arguments)
    elif annotation in (None, NoneType):
        yield "null"
    else:
        yield _SCALARS.get(annotation) or _describe_class(origin or annotation, arguments)


def _describe_class(kind: Any, arguments: tuple[Any, ...]) -> str:
    if kind is tuple and arguments and ... not in arguments:
        return f"a list of {len(arguments)} ({', '.join(map(_describe, arguments))})"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and (issubclass(list, kind) or kind in (tuple, set, frozenset)):
        of = f" ({_describe(arguments[0])} each)" if arguments and arguments[0] is not Any else ""
        return f"a list{of}"
    return f"a {getattr(kind, '__name__', kind)} (described with _target_)"
