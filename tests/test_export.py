"""What docs/export.md says."""

from pathlib import Path

import torch
from torch import nn

import memfold


def test_a_densified_model_is_exported_with_the_same_outputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    memfold.compress(model, "stable_rps", ratio=0.1)
    images = torch.randn(2, 1, 8, 8)
    program = torch.export.export(memfold.densify(model).eval(), (images,))
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(exported(images), model(images))
