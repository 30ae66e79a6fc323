"""What the adapters of model libraries share."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from memfold.errors import InputError

__all__ = ["import_extra", "refuse_unknown"]


def import_extra(module: str, backbone: str) -> Any:
    """Import a library that only one backbone needs.

    Raises:
        InputError: It is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # beside an unsuitable torchvision, timm raises RuntimeError
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == module
        reason = "" if is_missing else f", which does not load ({str(error).splitlines()[0]})"
        raise InputError(
            f"backbone={backbone} needs the extra {module}{reason}: "
            f"pip install -c constraints.txt -e '.[{module}]'"
        ) from error


def refuse_unknown(name: object, known: Iterable[str], what: str) -> None:
    """Check that the option `backbone.name` is among what a library has.

    Raises:
        InputError: It is not; the message has the nearest names.
    """
    known = list(known)
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name), known, n=5, cutoff=0.3)
    raise InputError(f"backbone.name={name}: is no {what}; nearest: {', '.join(nearest) or 'none'}")
