"""Finding, downloading and unpacking the files of a data set.

A file or folder is looked for in `<root>/<name>/`, where downloads go, and in `<root>/` itself.
What is derived from the files (an unpacked archive, decoded images) is written to
`<root>/<name>/`, or to the user's cache folder when that cannot be written.
"""

import gzip
import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pooch

from memfold.errors import InputError
from memfold.file_lock import take_lock
from memfold.files import open_regular

__all__ = [
    "Remote",
    "fetch",
    "find",
    "first_line",
    "folder_of_sets",
    "move_into_place",
    "new_folder",
    "unpack",
    "writable_folder",
]

_MAX_UNPACKED = 8 * 2**30
"""Bytes in an archive, each member taken for a block: more than any data set here has."""
_BLOCK = 4096
_MAX_TAR_HEADER = 2**20
_LOCK, _CONTENT = "lock", "content"
"""In an unfinished folder: the lock of who fills it, and what is filled."""


@dataclass(frozen=True)
class Remote:
    """A published file."""

    url: str
    """Its last part is the name of the file."""

    checksum: str
    """For example "md5:..."; a download that differs is refused."""

    @property
    def filename(self) -> str:
        """The name of the file on disk."""
        return self.url.rpartition("/")[2]


def folder_of_sets(root: str | Path) -> Path:
    """Return the option `data.root`.

    Raises:
        InputError: It is empty.
    """
    if not str(root):
        raise InputError("data.root must be a folder (or set MEMFOLD_DATA), got nothing")
    return Path(root).expanduser()


def find(root: Path, name: str, relative: str) -> Path | None:
    """Return the path of the file or folder `relative` of data set `name`, or None."""
    folders = [root / name, root]
    if (writable := writable_folder(root, name)) not in folders:
        folders.append(writable)
    # Unlike its method, the function takes names that no file can have.
    return next((path for folder in folders if os.path.exists(path := folder / relative)), None)


def fetch(root: Path, name: str, remote: Remote, *, download: bool) -> Path:
    """Return the path of a published file, downloading it to `<root>/<name>/` if need be.

    Raises:
        InputError: The file is not there, and `download` is false or did not succeed.
    """
    if (found := find(root, name, remote.filename)) is not None:
        return found
    folder = root / name
    missing = f"data.root={root}: no {remote.filename} in {folder} or {root}"
    remedy = f"set data.root or MEMFOLD_DATA to a folder that has it (it comes from {remote.url})"
    if not download:
        raise InputError(f"{missing} and data.download=false; {remedy}")
    try:
        pooch.retrieve(
            remote.url,
            known_hash=remote.checksum,
            fname=remote.filename,
            path=folder,
            progressbar=True,
        )
    # requests' errors are OSErrors; pooch reports a wrong checksum or a bad answer by ValueError.
    except (OSError, ValueError) as error:
        reason = first_line(_root_of(error))
        raise InputError(f"{missing} and the download failed ({reason}); {remedy}") from error
    return folder / remote.filename


def _root_of(error: BaseException) -> BaseException:
    """Return what an error was raised from: of requests' three, the one that says why."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def unpack(archive: Path, folder: str, parent: Path) -> Path:
    """Unpack the top-level `folder` of a .tar.gz or .zip into `parent`, all of it or nothing.

    Returns:
        `parent / folder`.

    Raises:
        InputError: The archive is truncated, damaged, unsafe, too large or does not hold `folder`.
    """
    with new_folder(parent) as unpacked:
        try:
            with open_regular(archive) as file:
                if archive.suffix == ".zip":
                    with zipfile.ZipFile(file) as zipped:
                        _check_size(sum(max(m.file_size, _BLOCK) for m in zipped.infolist()))
                        zipped.extractall(unpacked)
                else:
                    with (
                        _BoundedGzip(fileobj=file) as stream,
                        tarfile.open(fileobj=stream, mode="r:") as tarred,
                    ):
                        _extract_files(tarred, unpacked)
        # Encryption, unknown methods, odd names and numbers: each library has its own errors.
        except Exception as error:
            raise InputError(
                f"{archive}: cannot be unpacked ({first_line(error)}); expected a complete archive "
                f"of {folder}/, and room in {parent}; delete it to download it again"
            ) from error
        if not (unpacked / folder).is_dir():
            raise InputError(f"{archive}: holds no {folder}/; delete it to download it again")
        move_into_place(unpacked / folder, parent / folder)
    return parent / folder


def _extract_files(tarred: tarfile.TarFile, folder: Path) -> None:
    """Extract regular files only, inside `folder`; tarfile's own filter came with Python 3.11.4.

    Raises:
        tarfile.TarError: A member is a link or device, or leads out of the folder.
        ValueError: There is too much of it.
    """
    total = 0
    for member in tarred:
        total += max(member.size, _BLOCK)
        _check_size(total)
        path = (folder / member.name).resolve()
        if not path.is_relative_to(folder.resolve()) or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"unsafe member {member.name}")
        if (content := tarred.extractfile(member)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, path.open("wb") as file:
                shutil.copyfileobj(content, file)


def _check_size(total: int) -> None:
    if total > _MAX_UNPACKED:
        raise ValueError(f"more than {_MAX_UNPACKED} bytes when unpacked")


class _BoundedGzip(gzip.GzipFile):
    """Refuses to read at once what only a tar header of a wrong size asks for."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_TAR_HEADER:
            raise tarfile.TarError(f"a header of {size} bytes")
        return super().read(size)


def writable_folder(root: Path, name: str) -> Path:
    """Return `<root>/<name>`, or a folder in the user's cache when that cannot be written."""
    folder = root / name
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if os.access(existing, os.W_OK):
        return folder
    return Path(pooch.os_cache("memfold")) / name


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder inside `parent`, gone afterwards with whatever is left in it.

    It is on the same file system as its final place, so that what is finished can be moved there
    in one step: an interrupted process leaves nothing that looks complete. What a killed one has
    left is removed when the next folder is made there.

    Raises:
        InputError: It cannot be made.
    """
    place = parent / f".unfinished-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        try:
            _remove_abandoned(parent)
            place.mkdir(parents=True)
            lock = stack.enter_context((place / _LOCK).open("w"))
            with suppress(OSError):  # a file system without locks: nobody removes anything there
                take_lock(lock, waits=True)
            (place / _CONTENT).mkdir()
        except (OSError, ValueError) as error:  # NUL in a name
            raise InputError(
                f"data.root: nothing can be written to {parent} ({first_line(error)}); set "
                "data.root or MEMFOLD_DATA to a folder of your own"
            ) from error
        yield place / _CONTENT


def _remove_abandoned(parent: Path) -> None:
    """Remove the unfinished folders of processes that live no more."""
    for content in parent.glob(f".unfinished-*/{_CONTENT}"):  # is made under the lock
        with suppress(OSError), (content.parent / _LOCK).open() as lock:
            if take_lock(lock, waits=False):
                shutil.rmtree(content.parent, ignore_errors=True)


def move_into_place(finished: Path, target: Path) -> None:
    """Rename a folder to `target`; when another process got there first, keep the other's.

    Raises:
        InputError: There is something else.
    """
    try:
        finished.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise InputError(
                f"{target}: cannot be made ({first_line(error)}); delete what is there"
            ) from error


def first_line(error: BaseException) -> str:
    """Name an error and the beginning of its first line, to quote it inside a message."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
