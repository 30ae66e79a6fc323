"""Checkpoints are there in full or not at all."""

from pathlib import Path

import pytest
import torch

from memfold.errors import InputError
from memfold.training.checkpoint_io import AtomicCheckpointIO


class Unsaveable:
    """Fails in the middle of a save, as a full disk does."""

    def __reduce__(self) -> str:
        raise OSError("no space left on device")


def test_saves_what_it_loads(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(3)}}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_failed_save_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*last\.ckpt: no space left"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(99), "x": Unsaveable()}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
