"""Options of a class or function against its own signature: names and types."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from memfold.errors import InputError
from memfold.options import describe, fits

__all__ = ["check_options"]


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
        if not (_is_default(value, named[name]) or fits(value, annotation)):
            raise InputError(f"{key}.{name} must be {describe(annotation)}, got {value!r}")
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
