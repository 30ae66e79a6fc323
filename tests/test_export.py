"""What docs/export.md says."""

from pathlib import Path

import pytest
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


@pytest.mark.filterwarnings("ignore")  # of the exporter's own
def test_an_onnx_file_gives_the_same_outputs(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    memfold.compress(model, "stable_rps", ratio=0.1)
    images = torch.randn(2, 1, 8, 8)
    torch.onnx.export(memfold.densify(model).eval(), (images,), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    inputs = {graph.graph.input[0].name: images.numpy()}
    (found,) = reference.ReferenceEvaluator(graph).run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(found), model(images))
