"""The files of the three splits, as a user names them."""

import os.path
from collections.abc import Sequence
from pathlib import Path

from memfold.errors import InputError

__all__ = ["by_place", "paths_of", "source_of"]

_KEYS = ("files", "val_files", "test_files")


def paths_of(
    files: Sequence[str],
    val_files: Sequence[str] | None,
    test_files: Sequence[str] | None,
    *,
    val_fraction: float,
    test_fraction: float,
) -> list[list[Path]]:
    """Return the paths of three splits, or of one group that is to be parted by the fractions.

    Raises:
        InputError: A group is empty, one is missing, a file is named twice, or the fractions leave
            nothing to train on.
    """
    if (val_files is None) != (test_files is None):
        raise InputError(
            "data.val_files and data.test_files: give both, or neither to part data.files"
        )
    if val_fraction + test_fraction >= 1:
        raise InputError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction}: must "
            "leave something to train on"
        )
    groups = dict(zip(_KEYS, (files, val_files, test_files), strict=True))
    for key, paths in groups.items():
        if paths is not None and not (paths and all(path and "\0" not in path for path in paths)):
            raise InputError(f"data.{key} must name files, got {paths!r}")
    found = {
        key: [Path(path).expanduser() for path in paths]
        for key, paths in groups.items()
        if paths is not None
    }
    key_of: dict[str, str] = {}
    for key, path in ((key, path) for key, paths in found.items() for path in paths):
        real = os.path.realpath(path)
        if real in key_of:
            raise InputError(
                f"data.{key}: {path} is in data.{key_of[real]} already; a file is named once, or "
                "splits would share it"
            )
        key_of[real] = key
    return list(found.values())


def by_place(groups: Sequence[Sequence[Path]]) -> dict[str, Path]:
    """Name files by where they stand in the options."""
    return {
        f"{group}/{number}": path
        for group, paths in enumerate(groups)
        for number, path in enumerate(paths)
    }


def source_of(paths: Sequence[Sequence[Path]]) -> dict[str, object]:
    """Return what `paths_of` has found, as options with absolute paths."""
    return {
        key: [os.path.abspath(path) for path in group]
        for key, group in zip(_KEYS, paths, strict=False)
    }
