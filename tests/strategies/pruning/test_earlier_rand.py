"""RAND of earlier versions, which rounded the shares of `scope=layer` in another way, is read."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfold
from forging import forge
from memfold.strategies.pruning import masks
from reference.pruning import largest_remainders


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 5))


def networks(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[nn.Sequential, nn.Sequential]:
    """Compress one as earlier versions did, and one as today."""
    options = {"ratio": 7 / 43, "scope": "layer", **options}
    with monkeypatch.context() as earlier:
        earlier.setattr(masks, "_equal_shares", largest_remainders)
        old = memfold.compress(build(), "rand", **options)
    new = memfold.compress(build(), "rand", **options)
    assert not torch.equal(old[2].weight, new[2].weight)
    return old, new


def as_version_2(contents: dict[str, Any], _: dict[str, Tensor]) -> None:
    del contents["ties"]
    contents["version"] = 2


@pytest.mark.parametrize("shuffle", [False, True])
def test_artifacts(shuffle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = networks(monkeypatch, shuffle=shuffle)
    memfold.save(old, path := tmp_path / "old.safetensors")
    example = torch.randn(2, 1)
    assert torch.equal(memfold.load(path, build())(example), old(example))
    forge(path, as_version_2, signed=False)
    assert torch.equal(memfold.load(path, build())(example), old(example))


def test_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = networks(monkeypatch)
    today = copy.deepcopy(new)
    example = torch.randn(2, 1)
    for source in (old, today, old):  # forth and back
        new.load_state_dict(source.state_dict())
        assert torch.equal(new(example), source(example))
    memfold.save(new, tmp_path / "again.safetensors")
    loaded = memfold.load(tmp_path / "again.safetensors", build())
    assert torch.equal(loaded(example), old(example))
