"""MNIST and Fashion-MNIST from idx.gz files."""

import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from data.writers import cycling_labels, idx_content, random_bytes, write_idx, write_idx_set
from memfold.data.fashion_mnist import FashionMNIST
from memfold.data.images.idx import IdxDataModule, read_idx
from memfold.data.mnist import MNIST
from memfold.errors import InputError

SETS = [MNIST, FashionMNIST]
IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"


def test_values_and_shape_survive(tmp_path: Path) -> None:
    values = random_bytes((3, 4, 5))
    write_idx(tmp_path / "x.gz", values)
    assert torch.equal(read_idx(tmp_path / "x.gz", (None, 4, 5)), torch.from_numpy(values))


@pytest.mark.parametrize("build", SETS)
@pytest.mark.parametrize("place", ["own", "root"])
def test_reads_both_places(build: type[IdxDataModule], place: str, tmp_path: Path) -> None:
    write_idx_set(tmp_path / build.name if place == "own" else tmp_path)
    module = build(root=str(tmp_path), download=False)
    module.prepare_data()
    train, test = module.load_train(), module.load_test()
    assert train.images.shape == (40, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.images[:, 0, 0, 0].tolist() == list(range(40))
    assert torch.equal(
        train.images[:, 0, 0, 1:], torch.from_numpy(random_bytes((40, 28, 28)))[:, 0, 1:]
    )
    assert train.labels.tolist() == cycling_labels(40, 10).tolist()
    assert train.labels.dtype == torch.int64
    assert len(test) == 20


def test_the_own_folder_comes_first(tmp_path: Path) -> None:
    write_idx_set(tmp_path, num_train=30)
    write_idx_set(tmp_path / "mnist", num_train=50)
    assert len(MNIST(root=str(tmp_path)).load_train()) == 50


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


GOOD = idx_content(random_bytes((6, 28, 28)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "starts with nothing, expected 00000803"),
        (gz(GOOD)[:-3000], "expected a complete gzip file"),
        (gz(GOOD)[:-4], "expected a complete gzip file"),
        (b"<html>not found</html>", "BadGzipFile.*expected a complete gzip file"),
        (gz(GOOD)[:60] + b"\0\1\2\3" * 20 + gz(GOOD)[140:], "expected a complete gzip file"),
        (gz(b"\0\0\x0d\3" + GOOD[4:]), "starts with 00000d03, expected 00000803"),
        (gz(idx_content(random_bytes((6,)))), "starts with 00000801, expected 00000803"),
        (gz(GOOD[:9]), "9 bytes, expected a header of 16"),
        (gz(GOOD[:-1]), "4703 values, expected 6 x 28 x 28 = 4704"),
        (gz(GOOD + b"\0"), "4705 values or more, expected 6 x 28 x 28 = 4704"),
        (gz(idx_content(random_bytes((0, 28, 28)))), "at least one"),
        (gz(idx_content(random_bytes((6, 28, 27)))), "6 x 28 x 27 values, expected N x 28 x 28"),
    ],
    ids=[
        "empty",
        "truncated",
        "no trailer",
        "no gzip",
        "damaged",
        "floats",
        "labels",
        "short header",
        "short",
        "long",
        "no images",
        "wrong size",
    ],
)
def test_damaged_images_give_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    write_idx_set(tmp_path / "mnist")
    (tmp_path / "mnist" / IMAGES).write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        MNIST(root=str(tmp_path)).setup("fit")
    message = str(raised.value)
    assert message.startswith(str(tmp_path / "mnist" / IMAGES))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (cycling_labels(39, 10), "39 values, expected 40"),
        (np.where(np.arange(40) == 7, 10, 3), r"label 10 at record 7, .* in 0\.\.9"),
    ],
)
def test_bad_labels_give_one_line(labels: np.ndarray, reason: str, tmp_path: Path) -> None:
    write_idx_set(tmp_path / "mnist")
    write_idx(tmp_path / "mnist" / LABELS, labels)
    with pytest.raises(InputError, match=reason) as raised:
        MNIST(root=str(tmp_path)).load_train()
    assert str(raised.value).startswith(str(tmp_path / "mnist" / LABELS))


def test_a_damaged_test_set_does_not_stop_training(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    module = MNIST(root=str(tmp_path), batch_size=8)
    module.setup("fit")
    assert len(module.train_dataloader().samples) == 36
    with pytest.raises(InputError, match="t10k-images"):
        module.setup("test")


def test_the_files_of_the_other_set_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx_set(tmp_path)
    digest = __import__("hashlib").md5((tmp_path / LABELS).read_bytes()).hexdigest()
    monkeypatch.setattr(MNIST, "foreign_labels", {digest: "fashion_mnist"})
    reason = rf"^data\.root={tmp_path}: {LABELS} in it belongs to fashion_mnist, not to mnist"
    with pytest.raises(InputError, match=reason):
        MNIST(root=str(tmp_path)).load_train()
    # in a folder of its own the name of the folder decides
    write_idx_set(tmp_path / "mnist")
    assert len(MNIST(root=str(tmp_path)).load_train()) == 40


def test_the_sets_know_each_other() -> None:
    for one, other in ((MNIST, FashionMNIST), (FashionMNIST, MNIST)):
        labels = {md5 for name, md5 in other.checksums.items() if "labels" in name}
        assert one.foreign_labels == dict.fromkeys(labels, other.name)


def test_no_more_is_read_than_the_header_says(tmp_path: Path) -> None:
    """A few bytes of gzip can stand for any number of zeros."""
    write_idx_set(tmp_path / "mnist")
    bomb = gz(GOOD + bytes(2**26))
    (tmp_path / "mnist" / IMAGES).write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(InputError, match="4705 values or more"):
        MNIST(root=str(tmp_path)).load_train()
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 2**22
    (tmp_path / "mnist" / IMAGES).write_bytes(gz(bytes([0, 0, 8, 3]) + b"\xff" * 4 + GOOD[8:]))
    with pytest.raises(InputError, match="4704 values, expected 4294967295 x 28 x 28"):
        MNIST(root=str(tmp_path)).load_train()


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_pipe_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no regular file"):
        MNIST(root=str(tmp_path)).load_train()


@pytest.mark.parametrize("root", ["a\0b", "a" * 400])
def test_a_root_that_no_folder_can_have(root: str) -> None:
    with pytest.raises(InputError, match=r"^data\.root=a"):
        MNIST(root=root, download=False).prepare_data()
