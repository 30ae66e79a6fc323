"""Checkpoints are there in full or not at all, and training need not wait for them."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import CheckpointIO

from memfold.errors import InputError
from memfold.training.checkpoint_io import AsyncCheckpointIO, AtomicCheckpointIO

BOTH = pytest.mark.parametrize("kind", [AtomicCheckpointIO, AsyncCheckpointIO])


class Unsaveable:
    """Fails in the middle of a save, as a full disk does."""

    def __reduce__(self) -> str:
        raise OSError("no space left on device")


@BOTH
def test_saves_what_it_loads(tmp_path: Path, kind: type[CheckpointIO]) -> None:
    path, io = tmp_path / "folder" / "last.ckpt", kind()
    io.save_checkpoint({"state_dict": {"w": torch.arange(3)}}, path)
    loaded = io.load_checkpoint(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    io.remove_checkpoint(path)
    io.teardown()
    assert not path.exists()


@BOTH
def test_what_a_killed_run_left_is_overwritten(tmp_path: Path, kind: type[CheckpointIO]) -> None:
    (tmp_path / "last.ckpt.partial").write_bytes(b"half a file" * 10000)
    io = kind()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    io.teardown()
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(tmp_path / "last.ckpt", weights_only=True) == {"epoch": 1}


def test_failed_save_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*last\.ckpt: no space left"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(99), "x": Unsaveable()}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Disk:
    """A disk that is slow or full: fsync waits until it may end."""

    def __init__(self) -> None:
        self.is_full = False
        self.may_end = threading.Event()
        self.has_begun = threading.Event()
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        self.has_begun.set()
        assert self.may_end.wait(20)
        if self.is_full:  # once: then there is room for a smaller file
            self.is_full = False
            raise OSError(28, "No space left on device")
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr("memfold.files.os.fsync", disk.fsync)
    yield disk
    disk.may_end.set()


def test_training_does_not_wait_and_saves_one_moment(tmp_path: Path, disk: Disk) -> None:
    io, path = AsyncCheckpointIO(), tmp_path / "last.ckpt"
    weights = torch.zeros(1000)
    checkpoint: dict[str, Any] = {
        "state_dict": OrderedDict(w=weights, view=weights[:3]),
        "loops": {"batch": 3, "list": [1, 2]},
    }
    io.save_checkpoint(checkpoint, path)  # would never return if it waited for the disk
    assert disk.has_begun.wait(20)
    weights += 1
    checkpoint["loops"]["batch"] = 4
    checkpoint["loops"]["list"].append(3)
    assert not path.exists()
    disk.may_end.set()
    io.teardown()
    loaded = torch.load(path, weights_only=True)
    assert not loaded["state_dict"]["w"].any()
    assert loaded["loops"] == {"batch": 3, "list": [1, 2]}
    assert path.stat().st_size < 4000 + 3000  # tensors that share memory are stored once


def test_both_kinds_write_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = {"state_dict": torch.nn.BatchNorm1d(3).state_dict(), "epoch": 1}
    for kind, folder in ((AtomicCheckpointIO, "a"), (AsyncCheckpointIO, "b")):
        io = kind()
        io.save_checkpoint(checkpoint, tmp_path / folder / "last.ckpt")
        io.teardown()
    files = [(tmp_path / folder / "last.ckpt") for folder in "ab"]
    loaded = [torch.load(file, weights_only=True) for file in files]
    assert loaded[0]["state_dict"]._metadata == loaded[1]["state_dict"]._metadata
    assert files[0].stat().st_size == files[1].stat().st_size


def test_one_copy_of_a_file_waits_in_memory(tmp_path: Path, disk: Disk) -> None:
    io = AsyncCheckpointIO()
    for name in ("best.ckpt", "last.ckpt"):
        io.save_checkpoint({"epoch": 1}, tmp_path / name)
    threading.Timer(0.2, disk.may_end.set).start()
    io.save_checkpoint({"epoch": 2}, tmp_path / "best.ckpt")
    assert disk.may_end.is_set()  # it has waited
    io.teardown()
    epochs = [torch.load(tmp_path / name)["epoch"] for name in ("best.ckpt", "last.ckpt")]
    assert epochs == [2, 1]


@pytest.mark.parametrize("ending", ["save", "load", "teardown"])
def test_full_disk_is_reported_and_nothing_earlier_is_damaged(
    tmp_path: Path, disk: Disk, ending: str
) -> None:
    disk.may_end.set()
    best, last = paths = [tmp_path / "best.ckpt", tmp_path / "last.ckpt"]
    for path in paths:
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = [path.read_bytes() for path in paths]
    disk.may_end.clear()
    disk.is_full = True
    io = AsyncCheckpointIO()
    for path in paths:  # the second one waits for the first, and must not be written after it
        io.save_checkpoint({"epoch": 2}, path)
    disk.may_end.set()
    endings: dict[str, Callable[[], object]] = {
        "save": lambda: io.save_checkpoint({"epoch": 3}, best),
        "load": lambda: io.load_checkpoint(last),
        "teardown": io.teardown,
    }
    with pytest.raises(InputError, match=r"cannot write .*best\.ckpt: No space left on device"):
        endings[ending]()
    io.teardown()
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.gpu
@BOTH
def test_tensors_of_the_gpu_are_saved_without_a_copy_there(
    tmp_path: Path, kind: type[CheckpointIO]
) -> None:
    weights = torch.zeros(2**22, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    io = kind()
    io.save_checkpoint({"w": weights}, tmp_path / "last.ckpt")
    weights += 1
    io.teardown()
    assert torch.cuda.max_memory_allocated() == before
    loaded = io.load_checkpoint(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    assert loaded["w"].device.type == "cpu"
    assert not loaded["w"].any()
