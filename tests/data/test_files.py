"""Downloads with checksums, and safe unpacking."""

import functools
import gc
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfold.data.files import Remote, fetch, unpack
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


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(b"PK\5\6" + bytes(18))  # an empty zip
    with pytest.raises(InputError, match=rf"^{archive}: holds no inside/"):
        unpack(archive, "inside", tmp_path / "target")
    archive.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=rf"^{archive}: cannot be unpacked \(BadZipFile"):
        unpack(archive, "inside", tmp_path / "target")
