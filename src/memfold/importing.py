"""What a user names by a dotted path: import it, and call it."""

import importlib
import inspect
from collections.abc import Callable, Mapping

from memfold.errors import InputError

__all__ = ["call", "locate"]


def locate(target: str | None, key: str) -> Callable[..., object]:
    """Import the object at a dotted path.

    The longest importable prefix is the module; the rest are attributes, so that a class inside
    a class can be named too.

    Args:
        target: For example "package.module.Class".
        key: Where it stands in the configuration, for messages.

    Raises:
        InputError: The path does not lead to a callable.
    """
    key = f"{key}={target}"
    names = target.split(".") if isinstance(target, str) else []
    if len(names) < 2 or not all(names):
        raise InputError(f"{key}: must be a dotted path to a class or function, as in pkg.mod.Name")
    found: object = _import(names[0], key)
    path = names[0]
    for name in names[1:]:
        if not hasattr(found, name) and inspect.ismodule(found):
            _import(f"{path}.{name}", key)
        if not hasattr(found, name):
            raise InputError(f"{key}: {path} has no attribute {name!r}")
        found = getattr(found, name)
        path = f"{path}.{name}"
    if not callable(found):
        raise InputError(f"{key}: is of type {type(found).__name__}, must be a class or function")
    return found


def call(
    build: Callable[..., object],
    args: Mapping[str, object] | None,
    facts: Mapping[str, object],
    group: str,
) -> object:
    """Call what was located, after a look at its signature.

    Args:
        build: The class or function.
        args: Keyword arguments of the user.
        facts: Further ones, before which the user's go.
        group: Of the configuration, for messages.

    Raises:
        InputError: The signature does not fit them.
    """
    given = dict(args or {})
    arguments = {**facts, **given}
    try:
        signature = inspect.signature(build)
    except ValueError:  # some builtins have none: they get what the user wrote and nothing else
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise InputError(
                f"{group}.args={given}: {error}; the signature of {group}.target is {signature}"
            ) from error
    return build(**arguments)


def _import(module: str, key: str) -> object:
    """Import a module by its full name; whatever goes wrong inside it is the user's to mend."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            parent, _, name = module.rpartition(".")
            where = (
                f"{parent} has no module or attribute {name!r}"
                if parent
                else (f"no module named {module!r}; is its folder in PYTHONPATH?")
            )
            raise InputError(f"{key}: {where}") from error
        raise InputError(f"{key}: importing {module} failed: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{key}: importing {module} failed: {reason}") from error
