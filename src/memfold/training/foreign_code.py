"""Of which classes the network of a run folder may be built: memfold's, and those a user names."""

import pkgutil
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from memfold import backbones, tasks
from memfold.compression import Strategy
from memfold.data import custom
from memfold.data.custom import build_custom
from memfold.data.data_module import DataModule
from memfold.errors import InputError
from memfold.runs.recorded import plain_leaves
from memfold.tasks import Task

__all__ = ["named_code", "refuse_foreign_code"]

_GROUPS = ("backbone", "compression", "data", "task")
"""What the network of a run is built from."""


def named_code(config: Mapping[str, Any]) -> set[str]:
    """Return what a configuration names of which the networks of others may be built, too."""
    names = [_names(group, config[group]) for group in _GROUPS if group in config]
    return {str(name) for found in names for name in found.values() if name is not None}


def refuse_foreign_code(config: Mapping[str, Any], allowed: Collection[str], remedy: str) -> None:
    """Check that the network of a run is built of memfold's classes and of those in `allowed`.

    Args:
        config: `backbone`, and the others of the groups if they are used, resolved.
        allowed: Dotted paths of further classes and functions.
        remedy: How to extend `allowed`, for the message: `{}` stands for a path.

    Raises:
        InputError: It names other code, or code among the arguments.
    """
    for group in _GROUPS:
        if group not in config:
            continue
        section = config[group]
        if not isinstance(section, Mapping):
            raise InputError(f"{group} must be a mapping, got {section!r}")
        arguments = {key: value for key, value in section.items() if key != "_target_"}
        for path, _ in plain_leaves([group], arguments):
            if "_target_" in path:
                key = ".".join(path)
                raise InputError(f"{key}: arguments that come from a run folder may name no code")
        for key, name in _names(group, section).items():
            if name not in allowed and not _is_of_memfold(group, name):
                raise InputError(
                    f"{group}.{key}={name} is no {group} of memfold, and a run folder may name no "
                    f"other code; if you trust it: {remedy.format(name)}"
                )


def _names(group: str, section: Mapping[str, Any]) -> dict[str, object]:
    """Return what a group names; the `target` of a table is a column."""
    names: dict[str, object] = {"_target_": section.get("_target_")}
    is_code = group == "backbone" or _resolve(names["_target_"]) is build_custom
    if is_code and "target" in section:
        names["target"] = section["target"]
    return names


def _resolve(path: object) -> object:
    """Import what is in memfold; `None` where there is no such thing."""
    if not isinstance(path, str) or not re.fullmatch(r"memfold(\.\w+)+", path):
        return None
    try:
        return pkgutil.resolve_name(path)
    except Exception:
        return None


def _is_of_memfold(group: str, path: object) -> bool:
    """Tell a class of a group from anything else that can be reached from memfold's modules."""
    bases = {"backbone": nn.Module, "compression": Strategy, "data": DataModule, "task": Task}
    builders = {"backbone": backbones, "data": custom, "task": tasks}
    found = _resolve(path)
    if isinstance(found, type):
        return issubclass(found, bases[group]) and found.__module__.startswith("memfold.")
    room = builders.get(group)  # functions count where they are on show
    return room is not None and found in [getattr(room, name) for name in room.__all__]
