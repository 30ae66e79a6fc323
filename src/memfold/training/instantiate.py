"""The only place that turns a `_target_` into an object."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from memfold.errors import InputError
from memfold.training.signatures import check_options

__all__ = ["instantiate", "target_of"]

_MISTAKES = (ValueError, TypeError, ImportError)
_HYDRAS_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


def instantiate(
    config: Mapping[str, Any], key: str, kind: type = object, /, **ready: object
) -> Any:
    """Call what `config["_target_"]` names.

    Args:
        config: Plain values, in which `${` is plain text; every other key is an argument.
        key: Where `config` stands in the configuration, for messages.
        kind: What it must give.
        **ready: Further arguments, which are passed as they are, neither copied nor converted.

    Raises:
        InputError: The target does not exist, refuses its arguments, or gives something else.
    """
    # Lightning is heavy, and every caller has imported it.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    mistakes = (*_MISTAKES, MisconfigurationException)
    target = target_of(config, key)
    try:
        if isinstance(target, type) and not issubclass(target, kind):
            raise InputError(_other_kind(config, key, kind))
        check_options(target, config, key, ready)
        made = _factory(config)(**ready)
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
    if not isinstance(made, kind):
        raise InputError(_other_kind(config, key, kind))
    return made


def target_of(config: Mapping[str, Any], key: str) -> Callable[..., object]:
    """Return what `config["_target_"]` names.

    Args:
        config: See `instantiate`.
        key: See `instantiate`.

    Raises:
        InputError: There is no such thing, or it cannot be called.
    """
    if not isinstance(config.get("_target_"), str):
        raise InputError(f"{key}._target_ must name a class or function, got {dict(config)}")
    try:
        target = hydra.utils.get_object(config["_target_"])
    except InstantiationException as error:
        raise InputError(_one_line(key, error.__cause__ or error)) from error
    except _MISTAKES as error:
        raise InputError(_one_line(key, error)) from error
    if not callable(target):
        raise InputError(_other_kind(config, key, object))
    return target


def _other_kind(config: Mapping[str, Any], key: str, kind: type) -> str:
    wanted = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    return f"{key}._target_={config['_target_']} must be a class or function that gives {wanted}"


def _factory(config: Mapping[str, Any]) -> functools.partial[Any]:
    """Look the target up as Hydra does, which refuses some, and bind its arguments.

    Hydra itself would resolve strings that have been resolved: a folder may be called `${seed}`.
    """
    target = hydra.utils.instantiate({"_target_": config["_target_"]}, _partial_=True)
    arguments = {key: _built(value) for key, value in config.items() if key not in _HYDRAS_KEYS}
    return functools.partial(target, *_built(config.get("_args_", [])), **arguments)


def _built(value: Any) -> Any:
    """Instantiate what is among arguments."""
    if isinstance(value, Mapping) and "_target_" in value:
        factory = _factory(value)
        return factory if value.get("_partial_") else factory()
    if isinstance(value, Mapping):
        return {key: _built(item) for key, item in value.items()}
    return [_built(item) for item in value] if isinstance(value, list) else value


def _one_line(key: str, error: BaseException) -> str:
    if "No supported gpu backend" in str(error):
        return (
            f"{key}: PyTorch finds no GPU here; trainer=cpu trains on the CPU, trainer=ddp_cpu in "
            "several processes on it"
        )
    return " ".join(f"{key}: {error}".split())
