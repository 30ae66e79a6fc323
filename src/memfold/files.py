"""Reading files that somebody else may have written; writing so that a reader finds a whole one.

A file may be a pipe that nobody writes to, a device that never ends, larger than any memory, or
text that takes more to read than its length says. All of it is refused before it costs anything.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from memfold.errors import InputError

__all__ = [
    "make_folder",
    "open_regular",
    "parse_json",
    "read_json",
    "read_text",
    "read_yaml_text",
    "replacing",
    "sync_folder",
    "write_text_atomically",
    "writing",
]

_MAX_BYTES = 64 * 2**20
"""Of a text that is read whole: more than any result or report has."""
_MAX_YAML_BYTES = 2**20  # PyYAML takes a second for as much
_MAX_DEPTH = 64


def open_regular(path: str | os.PathLike[str], mode: str = "rb", **options: Any) -> Any:
    """Open a file as `open` does, and return what it returns.

    Raises:
        OSError: It cannot be opened, or is a pipe, a device or a folder.
    """
    try:
        return open(path, mode, opener=_open_regular, **options)
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise OSError(errno.EINVAL, "no file has NUL in its name", str(path)) from error


def read_text(path: str | os.PathLike[str], max_bytes: int = _MAX_BYTES) -> str:
    """Read a UTF-8 file.

    Raises:
        OSError: It cannot be opened, is no regular file, or has more than `max_bytes`.
        UnicodeDecodeError: It is no UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than {max_bytes} bytes", str(path))
    return content.decode("utf-8")


def read_json(path: str | os.PathLike[str]) -> object:
    """Read a JSON file; see `parse_json`.

    Raises:
        OSError: As `read_text`.
        ValueError: It is no JSON as `parse_json` takes it.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> object:
    """Parse JSON into what can be written again: as UTF-8, in numbers that a float holds.

    Half of a surrogate pair, which names of files that are no UTF-8 have, becomes its escape.

    Raises:
        ValueError: It is no JSON, is nested deeply, or has a NaN, an infinity or a larger number.
    """
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for parent in level for item in _items(parent)]
        if not level:
            return _writable(value)
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def read_yaml_text(path: str | os.PathLike[str]) -> str:
    """Read a YAML file that holds a tree, for a loader of the caller's choice.

    An alias (`*name`) lets a value hold itself, or double in size with every line.

    Raises:
        OSError: As `read_text`.
        ValueError: It is no YAML, is nested deeply, or has an alias.
    """
    import yaml

    text = read_text(path, _MAX_YAML_BYTES)
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias, *{event.anchor}")
            if depth > _MAX_DEPTH:
                raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return text


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a lack of permission into one line.

    Raises:
        InputError: The block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        InputError: It cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that a reader finds the old or the new contents, never a part.

    The block gets an open file beside `path`, which takes its place once it is on the disk. Not
    even a power cut loses both.

    Raises:
        InputError: The file cannot be written; it is then what it was.
    """
    # One name for all attempts: what a killed run left is replaced, not collected.
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # it may be a link
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk; file systems that cannot are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file as `replacing` does.

    Raises:
        InputError: The file cannot be written; it is then what it was.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _open_regular(path: str, flags: int) -> int:
    # Without the flag, opening a pipe waits for the process at its other end.
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", path)
    return descriptor


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, list) else value


def _whole(text: str) -> int:
    number = int(text)  # refuses thousands of digits
    _finite(text)
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}... is too large")
    return number


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"JSON knows no {text}")
