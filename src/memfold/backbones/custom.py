"""Any importable class or function as a backbone."""

import importlib
import inspect
from collections.abc import Callable, Mapping

from torch import nn

from memfold.backbones.facts import named_facts
from memfold.data.spec import DataSpec
from memfold.errors import InputError

__all__ = ["build_custom"]


def build_custom(
    spec: DataSpec, *, target: str | None, args: Mapping[str, object] | None = None
) -> nn.Module:
    """Call the class or function at the dotted path `target` and return its module.

    Facts about the data are passed by keyword, each when the target's signature names it and
    `args` does not set it: see `memfold.backbones.facts`.

    Args:
        spec: What the data are.
        target: For example "package.module.Class".
        args: Further keyword arguments of the target.

    Raises:
        InputError: The path does not lead to a callable, its signature does not fit `args` or the
            data, or what it returned is no nn.Module.
    """
    build = _locate(target)
    given = dict(args or {})
    arguments = named_facts(build, spec, f"backbone.target={target}") | given
    try:
        signature = inspect.signature(build)
    except ValueError:  # some builtins have none: they get what the user wrote and nothing else
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise InputError(
                f"backbone.args={given}: {error}; the signature of backbone.target={target} "
                f"is {signature}"
            ) from error
    model = build(**arguments)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"backbone.target={target}: returned {type(model).__name__}, must return a "
            "torch.nn.Module"
        )
    return model


def _locate(target: str | None) -> Callable[..., object]:
    """Import the object at a dotted path.

    The longest importable prefix is the module; the rest are attributes, so that a class inside
    a class can be named too.
    """
    key = f"backbone.target={target}"
    names = target.split(".") if isinstance(target, str) else []
    if len(names) < 2 or not all(names):
        raise InputError(f"{key}: must be a dotted path to a class or function, as in pkg.mod.Net")
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
