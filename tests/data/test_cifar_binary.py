"""CIFAR-10 and CIFAR-100 from their binary versions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.writers import cifar_records, tar_folder, write_cifar10, write_cifar100
from memfold.data import source_files
from memfold.data.cifar10 import CIFAR10
from memfold.data.cifar100 import CIFAR100
from memfold.errors import InputError


@pytest.mark.parametrize("place", ["cifar10", "."])
def test_cifar10(place: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path / place / "cifar-10-batches-bin")
    module = CIFAR10(root=str(tmp_path), download=False)
    module.prepare_data()
    train, test = module.load_train(), module.load_test()
    records = np.concatenate([cifar_records(20, 1, 10, seed) for seed in range(5)])
    assert train.images.shape == (100, 3, 32, 32)
    assert np.array_equal(train.images.flatten(1).numpy(), records[:, 1:])
    # channel planes, row by row
    assert train.images[4, 2, 5, 7] == records[4, 1 + 2 * 1024 + 5 * 32 + 7]
    assert train.labels.tolist() == records[:, 0].tolist()
    assert train.labels.dtype == torch.int64
    assert len(test) == 20


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-binary")
    train = CIFAR100(root=str(tmp_path)).load_train()
    assert train.labels.tolist() == [number % 100 for number in range(200)]
    assert np.array_equal(train.images.flatten(1).numpy(), cifar_records(200, 2, 100)[:, 2:])


@pytest.mark.parametrize("place", ["cifar10", "."])
def test_the_archive_is_unpacked_once(place: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path / "made" / "cifar-10-batches-bin")
    root = tmp_path / "root"
    tar_folder(tmp_path / "made" / "cifar-10-batches-bin", root / place / "cifar-10-binary.tar.gz")
    module = CIFAR10(root=str(root), download=False)
    module.prepare_data()
    assert len(module.load_train()) == 100
    unpacked = root / "cifar10" / "cifar-10-batches-bin" / "data_batch_1.bin"
    changed = unpacked.stat().st_mtime_ns
    module.prepare_data()
    assert unpacked.stat().st_mtime_ns == changed
    assert not list(root.glob("**/.unfinished*"))


def test_a_root_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "made" / "cifar-10-batches-bin")
    root = tmp_path / "root"
    tar_folder(tmp_path / "made" / "cifar-10-batches-bin", root / "cifar-10-binary.tar.gz")
    monkeypatch.setattr(source_files.os, "access", lambda path, mode: False)
    monkeypatch.setattr(
        source_files.pooch, "os_cache", lambda project: tmp_path / "cache" / project
    )
    module = CIFAR10(root=str(root), download=False)
    module.prepare_data()
    assert len(module.load_train()) == 100
    assert (tmp_path / "cache" / "memfold" / "cifar10" / "cifar-10-batches-bin").is_dir()
    assert [path.name for path in root.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_a_truncated_archive(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "made" / "cifar-10-batches-bin")
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    tar_folder(tmp_path / "made" / "cifar-10-batches-bin", archive)
    archive.write_bytes(archive.read_bytes()[:-20_000])
    with pytest.raises(InputError, match="expected a complete archive of cifar-10-batches-bin/"):
        CIFAR10(root=str(tmp_path), download=False).prepare_data()
    # nothing that looks complete is left for the next run
    assert [path.name for path in (tmp_path / "cifar10").iterdir()] == [archive.name]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes, expected a positive multiple of 3073"),
        (cifar_records(20, 1, 10).tobytes()[:-1], "61459 bytes, expected a positive multiple"),
        (cifar_records(19, 1, 10).tobytes(), "19 records, expected 20, as many as data_batch_1"),
        (cifar_records(20, 1, 11).tobytes(), r"label 10 at record 10, .* 0\.\.9"),
    ],
    ids=["empty", "truncated", "a record short", "label"],
)
def test_damaged_records_give_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        CIFAR10(root=str(tmp_path)).setup("fit")
    message = str(raised.value)
    assert message.startswith(str(folder / "data_batch_3.bin"))
    assert "\n" not in message


def test_a_missing_batch(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    write_cifar10(folder)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(InputError, match=rf"^data\.root=.*{folder} has no test_batch\.bin.*https"):
        CIFAR10(root=str(tmp_path)).prepare_data()


def test_nothing_there(tmp_path: Path) -> None:
    module = CIFAR100(root=str(tmp_path), download=False)
    with pytest.raises(InputError, match=r"no cifar-100-binary\.tar\.gz in .*cifar100 or "):
        module.prepare_data()
    with pytest.raises(InputError, match=r"no cifar-100-binary in .*cifar100 or "):
        module.load_train()


def test_a_set_of_another_size_than_published_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    data = CIFAR10(root=str(tmp_path))
    data.setup("fit")
    data.setup("test")
    assert "training set in" in caplog.text
    assert "has 100 images, as published it has 50000" in caplog.text
    assert "has 20 images, as published it has 10000" in caplog.text
