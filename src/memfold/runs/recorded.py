"""What a run folder says of its run, whoever wrote it: settings, but not which code runs.

Whoever can hand over a folder could otherwise name any function with any arguments. So nothing
that a folder says is instantiated unless it is a class of memfold, or the user names it again.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.files import read_yaml_text
from memfold.overrides import parse
from memfold.runs.folder import HYDRA_FOLDER

__all__ = [
    "is_setting",
    "leaves_of",
    "plain_leaves",
    "read_config",
    "read_overrides",
    "read_settings",
]

CONFIG = Path(HYDRA_FOLDER, "config.yaml")
OVERRIDES = Path(HYDRA_FOLDER, "overrides.yaml")
_NAMES_CODE = ("backbone.target", "distill.allow")
_FILES = ("init_from",)  # top-level keys that are no choices
_NAMES_PLACE = ("dirpath", "filename")  # of a callback
_WORD = re.compile(r"[A-Za-z][\w-]*")
_CHOICE = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
# OmegaConf's: a backslash makes ${ plain text, another one makes it plain itself.
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\\$\{")
_REFERENCE = re.compile(
    r"\$\{(?:(?P<key>[A-Za-z]\w*(?:\.\w+)*)|hydra:runtime\.output_dir|oc\.env:\w+(?:,[\w./~-]*)?)\}"
)
_LONGEST_REFERENCE = 256
# What was done before there was an option. Any other that a configuration lacks has its default.
_BEFORE_THE_OPTION = {("compression", "structured"): "share"}


def read_config(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read parts of the configuration of a run, resolved, as plain values.

    A value may refer to a plain one or to an environment variable. References to references are
    refused: they can multiply.

    Args:
        folder: The run folder.
        keys: Dotted, such as `backbone` or `data._target_`; empty for everything.

    Raises:
        InputError: The configuration is missing or damaged, or lacks a key.
    """
    file = folder / CONFIG
    try:
        loaded = _load(file)
        found = {}
        for key in keys or map(str, loaded):
            _refuse_growth(loaded, key)
            value = OmegaConf.select(loaded, key)
            is_container = OmegaConf.is_config(value)
            found[key] = OmegaConf.to_container(value, resolve=True) if is_container else value
        return found
    except OSError as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{file} cannot be read: {reason}") from error
    except (ValueError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the plain values of a configuration that say neither which code runs nor where.

    Returns:
        Dotted key -> number, text, `None` or a list of them. Those that refer to others are left
        out.

    Raises:
        OSError, ValueError, TypeError, yaml.YAMLError, OmegaConfBaseException: See `read_config`,
            which comes first.
    """
    config = OmegaConf.to_container(_load(folder / CONFIG), resolve=False)
    return {key: value for key, value in leaves_of(config) if _is_plain_setting(key, value)}


def leaves_of(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every dotted key of nested mappings that has no keys below it, and its value."""
    if not isinstance(value, dict) or (prefix and not value):
        yield prefix, value
        return
    for key, item in value.items():
        yield from leaves_of(item, f"{prefix}.{key}" if prefix else str(key))


def read_overrides(folder: Path) -> list[Override]:
    """Read the overrides that a run was started with.

    Raises:
        InputError: They are missing or damaged.
    """
    file = folder / OVERRIDES
    try:
        texts = yaml.safe_load(read_yaml_text(file))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it holds no list of overrides")
        return parse(texts)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, HydraException) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def is_setting(override: Override) -> bool:
    """Tell whether an override only sets plain values and makes choices of the configuration.

    Others name code (`_target_`, the class of a custom backbone), belong to Hydra (launchers,
    callbacks and search paths run code), refer to files elsewhere or to other values.
    """
    key = override.key_or_group
    if override.package is not None or key.partition(".")[0].partition("/")[0] == "hydra":
        return False
    try:
        leaves = list(plain_leaves(key.split("."), override.value()))
    except TypeError:
        return False
    is_choice = "." not in key and key not in _FILES
    return all(
        _is_plain(path, leaf)
        and not (isinstance(leaf, str) and is_choice and not _CHOICE.fullmatch(leaf))
        for path, leaf in leaves
    )


def _is_plain_setting(key: str, value: object) -> bool:
    try:
        return all(_is_plain(path, leaf) for path, leaf in plain_leaves(key.split("."), value))
    except TypeError:
        return False


def _is_plain(path: list[str], leaf: object) -> bool:
    return (
        all(_WORD.fullmatch(word) for part in path for word in part.split("/"))
        and ".".join(path) not in _NAMES_CODE
        and not (path == ["data", "target"] and "." in str(leaf))  # no column of a table, perhaps
        and not (path[0] == "callbacks" and path[-1] in _NAMES_PLACE)
        and not (isinstance(leaf, str) and "${" in _ESCAPED.sub(r"\1", leaf))
    )


def plain_leaves(path: list[str], value: Any) -> Iterator[tuple[list[str], object]]:
    """Yield all plain values below `value`, those of a sweep too, and where they stand.

    Raises:
        TypeError: A value is not plain.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from plain_leaves([*path, *str(key).split(".")], item)
        if not value:
            yield path, None
    elif isinstance(value, list | ChoiceSweep):
        items = value.list if isinstance(value, ChoiceSweep) else value
        for item in [*items, None]:
            yield from plain_leaves(path, item)
    elif value is None or isinstance(value, str | int | float):
        yield path, value
    elif isinstance(value, RangeSweep | IntervalSweep | Glob):  # numbers; choices that there are
        yield path, None
    else:
        raise TypeError(f"{value!r} is no plain value")


def _load(file: Path) -> DictConfig:
    loaded = OmegaConf.create(read_yaml_text(file))
    if not isinstance(loaded, DictConfig):
        raise TypeError("it is no mapping")
    for (group, option), meaning in _BEFORE_THE_OPTION.items():
        section = loaded.get(group)
        if isinstance(section, DictConfig) and option not in section:
            section[option] = meaning
    return loaded


def _refuse_growth(loaded: DictConfig, key: str) -> None:
    """Refuse what could take more memory than the file, or what runs a resolver of Hydra's.

    Raises:
        ValueError: A value refers to something else than a short plain one.
    """
    raw: Any = OmegaConf.to_container(loaded, resolve=False)
    value: Any = raw
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"it has no {key}")
        value = value[part]
    for path, leaf in plain_leaves([key], value):
        if not isinstance(leaf, str):
            continue
        text = _ESCAPED.sub(r"\1", leaf)
        is_short = all(
            _is_short(raw, match["key"]) for match in _REFERENCE.finditer(text) if match["key"]
        )
        if "${" in _REFERENCE.sub("", text) or not is_short:
            raise ValueError(f"{'.'.join(path)}={leaf[:80]} may only refer to a plain value")


def _is_short(raw: Any, key: str) -> bool:
    value = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str):
        return "${" not in value and len(value) < _LONGEST_REFERENCE
    return not isinstance(value, dict | list)
