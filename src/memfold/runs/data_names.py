"""What data are called where the name of their kind, such as `table`, does not say which."""

import json
import os.path
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["digest", "name_data", "source_of"]

_OF_RECIPES = ("folder", "file", "files", "val_files", "test_files", "target", "args")
"""Options that say it in recipes, of data sets that do not say it themselves."""
_MOST_ITEMS = 3
_LONGEST = 80

Data = tuple[str, Mapping[str, object]]
"""The choice of `data=`, and what `source_of` returns."""


def source_of(result: Mapping[str, Any]) -> dict[str, object]:
    """Return what tells the data of a run from others of their kind; empty where the kind does.

    Args:
        result: Its `data_source`, or else its `recipe`, says it.
    """
    said, recipe = (result.get(key) for key in ("data_source", "recipe"))
    if isinstance(said, Mapping) and said:
        return {str(key): value for key, value in said.items()}
    options = recipe if isinstance(recipe, Mapping) else {}
    found = {key: options.get(f"data.{key}") for key in _OF_RECIPES}
    if options.get("data.fold") is not None:
        found["folds"] = options.get("data.num_folds")
    return {key: _normal(value) for key, value in found.items() if value}


def name_data(data: Sequence[Data]) -> list[str]:
    """Return a name for each: equal where kind and source are, and nowhere else.

    Of an absolute path it shows as many of the last parts as tell it from all others.
    """
    tails = _tails({text for _, source in data for text in _texts([*source.values()])})
    names = [_write(kind, source, tails) for kind, source in data]
    told = defaultdict(set)
    for name, one in zip(names, data, strict=True):
        told[name].add(digest(one))
    return [
        name if len(told[name]) == 1 else f"{name} ({digest(one)})"
        for name, one in zip(names, data, strict=True)
    ]


def digest(data: Data) -> str:
    """Return eight hexadecimal digits of kind and source."""
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"


def _normal(value: object) -> object:
    if isinstance(value, list):
        return [_normal(item) for item in value]
    return os.path.normpath(value) if isinstance(value, str) and os.path.isabs(value) else value


def _texts(values: Sequence[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)


def _tails(texts: Collection[str]) -> dict[str, str]:
    """Return the last parts of each text that no other ends in."""
    found: dict[str, str] = {}
    length = 0
    while len(found) < len(texts):
        length += 1
        ends = {text: "/".join(text.split("/")[-length:]) for text in texts}
        counts = Counter(ends.values())
        found = {text: end for text, end in ends.items() if counts[end] == 1} | found
    return found


def _write(kind: str, source: Mapping[str, object], tails: Mapping[str, str]) -> str:
    parts = [
        f"{key}={value}" if isinstance(value, int | float) else _show(value, tails)
        for key, value in source.items()
    ]
    name = " ".join(f"{kind} {', '.join(parts)}".split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _show(value: object, tails: Mapping[str, str]) -> str:
    if isinstance(value, list):
        shown = [_show(item, tails) for item in value[:_MOST_ITEMS]]
        further = [f"{len(value) - _MOST_ITEMS} more"] if len(value) > _MOST_ITEMS else []
        return " + ".join([*shown, *further])
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_show(item, tails)}" for key, item in value.items())
    if isinstance(value, str):
        return tails.get(value, value) if os.path.isabs(value) else value
    return json.dumps(value)
