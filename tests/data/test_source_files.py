"""Downloads with checksums, and safe unpacking."""

import functools
import gc
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfold.data import source_files
from memfold.data.source_files import Remote, fetch, move_into_place, new_folder, unpack
from memfold.errors import InputError

CONTENT = b"published content"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a folder on this machine, without any network."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "set.gz").write_bytes(CONTENT)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
    gc.collect()


# After a refused answer pooch leaves the connection to the garbage collector.
leaves_connections = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_missing_file_is_downloaded_once(url: str, tmp_path: Path) -> None:
    remote = Remote(f"{url}/set.gz", MD5)
    path = fetch(tmp_path, "digits", remote, download=True)
    assert path == tmp_path / "digits" / "set.gz"
    assert path.read_bytes() == CONTENT
    gone = Remote("http://127.0.0.1:9/set.gz", MD5)
    assert fetch(tmp_path, "digits", gone, download=True) == path
    assert fetch(tmp_path, "digits", gone, download=False) == path


@leaves_connections
def test_a_wrong_checksum_is_refused(url: str, tmp_path: Path) -> None:
    remote = Remote(f"{url}/set.gz", "md5:" + "0" * 32)
    with pytest.raises(InputError, match=r"^data\.root=.*the download failed \(ValueError: MD5"):
        fetch(tmp_path, "digits", remote, download=True)
    assert not list(tmp_path.glob("**/*.gz"))


@leaves_connections
@pytest.mark.parametrize("kind", ["absent", "unreachable", "forbidden"])
def test_a_missing_file_names_everything(url: str, kind: str, tmp_path: Path) -> None:
    base = {"absent": url, "unreachable": "http://127.0.0.1:9", "forbidden": url}[kind]
    remote = Remote(f"{base}/nothing.gz", MD5)
    with pytest.raises(InputError) as raised:
        fetch(tmp_path, "digits", remote, download=kind != "forbidden")
    message = str(raised.value)
    assert message.startswith(f"data.root={tmp_path}: no nothing.gz in {tmp_path / 'digits'}")
    assert remote.url in message
    assert ("data.download=false" in message) == (kind == "forbidden")
    assert ("the download failed" in message) == (kind != "forbidden")
    assert ("failed (ConnectionRefusedError: " in message) == (kind == "unreachable")
    assert "\n" not in message


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(InputError, match=r"the download failed \(NotADirectoryError"):
        fetch(tmp_path / "root", "digits", Remote("http://127.0.0.1:9/x.gz", MD5), download=True)


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt"])
def test_an_archive_cannot_write_outside(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "set.tar.gz"
    with tarfile.open(archive, "w:gz") as tarred:
        member = tarfile.TarInfo(name)
        member.size = 3
        tarred.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises(InputError, match=r"cannot be unpacked|holds no inside/"):
        unpack(archive, "inside", tmp_path / "target")
    assert not list(tmp_path.glob("**/outside.txt"))
    assert not Path("/outside.txt").exists()


def test_a_file_in_the_way_of_a_finished_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    with new_folder(tmp_path) as folder, pytest.raises(InputError, match="delete what is there"):
        move_into_place(folder, tmp_path / "target")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(b"PK\5\6" + bytes(18))  # an empty zip
    with pytest.raises(InputError, match=rf"^{archive}: holds no inside/"):
        unpack(archive, "inside", tmp_path / "target")
    archive.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=rf"^{archive}: cannot be unpacked \(BadZipFile"):
        unpack(archive, "inside", tmp_path / "target")


def zip_bytes(name: str = "inside/a") -> bytearray:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as zipped:
        zipped.writestr(name, b"contents")
    return bytearray(content.getvalue())


def patched(offset: int, value: int) -> bytes:
    """Change a byte of the local and of the central header."""
    content = zip_bytes()
    content[offset] = value
    content[content.index(b"PK\1\2") + offset + 2] = value
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [patched(6, 1), patched(8, 99), patched(8, 14), bytes(zip_bytes("inside/" + "a" * 400))],
    ids=["encrypted", "unknown method", "not LZMA", "long name"],
)
def test_odd_zip_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{archive}: cannot be unpacked") as raised:
        unpack(archive, "inside", tmp_path / "target")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "target").iterdir())


def tar_member(archive: Path, member: tarfile.TarInfo, content: bytes = b"") -> None:
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT) + content)


def test_an_archive_that_grows_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, large = tmp_path / "set.tar.gz", tarfile.TarInfo("inside/a")
    header = tarfile.TarInfo("names")
    header.type, header.size = tarfile.XHDTYPE, 2**25
    tar_member(archive, header, bytes(2**25))
    with pytest.raises(InputError, match="a header of 33554432 bytes"):
        unpack(archive, "inside", tmp_path / "target")
    large.size = 2**33 - 1
    tar_member(archive, large)
    (tmp_path / "set.zip").write_bytes(zip_bytes())
    for path, limit in ((archive, 2**32), (tmp_path / "set.zip", 4000)):  # a file takes a block
        monkeypatch.setattr(source_files, "_MAX_UNPACKED", limit)
        with pytest.raises(InputError, match="bytes when unpacked"):
            unpack(path, "inside", tmp_path / "target")


def test_a_pipe_in_place_of_an_archive(tmp_path: Path) -> None:
    for name in ("set.zip", "set.tar.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="is no regular file"):
            unpack(tmp_path / name, "inside", tmp_path / "target")


def test_unfinished_folders_stay_while_their_process_lives(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-killed" / "content").mkdir(parents=True)
    (tmp_path / ".unfinished-killed" / "lock").touch()
    with new_folder(tmp_path) as living, new_folder(tmp_path) as own:
        assert set(tmp_path.iterdir()) == {living.parent, own.parent}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nope", "\0"])
def test_a_root_where_nothing_can_be_made_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"^data\.root: nothing can be written to ") as raised,
        new_folder(tmp_path / place / "digits"),
    ):
        pass
    assert "\n" not in str(raised.value)
