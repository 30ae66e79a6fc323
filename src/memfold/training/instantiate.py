"""The only place that turns a `_target_` into an object."""

import inspect
from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from memfold.errors import InputError

__all__ = ["instantiate"]

_MISTAKES = (ValueError, TypeError, ImportError)


def instantiate(config: Mapping[str, Any], key: str, **ready: object) -> Any:
    """Call what `config["_target_"]` names.

    Args:
        config: Plain values; every other key is an argument.
        key: Where `config` stands in the configuration, for messages.
        **ready: Further arguments, which are passed as they are, neither copied nor converted.

    Raises:
        InputError: The target does not exist or refuses its arguments.
    """
    # Lightning is heavy, and every caller has imported it.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    mistakes = (*_MISTAKES, MisconfigurationException)
    if not isinstance(config.get("_target_"), str):
        raise InputError(f"{key}._target_ must name a class or function, got {dict(config)}")
    try:
        _refuse_unknown(config, key, ready)
        factory = hydra.utils.instantiate(config, _partial_=True, _convert_="all")
        return factory(**ready)
    except InputError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from error
        if cause is None or isinstance(cause, mistakes):
            raise InputError(_one_line(key, cause or error)) from error
        raise
    except mistakes as error:
        raise InputError(_one_line(key, error)) from error


def _refuse_unknown(config: Mapping[str, Any], key: str, ready: Mapping[str, object]) -> None:
    """Name the options that the target has, where its signature tells."""
    try:
        parameters = inspect.signature(hydra.utils.get_object(config["_target_"])).parameters
    except (ValueError, TypeError):
        return  # built-in
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    named = [
        name
        for name, p in parameters.items()
        if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) and name not in ready
    ]
    for name in config:
        if not name.startswith("_") and name not in named:
            raise InputError(f"{key}.{name} is no option; options: {', '.join(named)}")


def _one_line(key: str, error: BaseException) -> str:
    if "No supported gpu backend" in str(error):
        return (
            f"{key}: PyTorch finds no GPU here; trainer=cpu trains on the CPU, trainer=ddp_cpu in "
            "several processes on it"
        )
    return " ".join(f"{key}: {error}".split())
