"""Scaled gradients: the same numbers forwards, and through the compiler too."""

import pytest
import torch

from memfold.strategies.layers.gradients import scale_gradient


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")
def test_one_graph_computes_the_same():
    compiled = torch.compile(scale_gradient, backend="eager", fullgraph=True)
    tensor = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for scale in (scale_gradient, compiled):
        tensor.grad = None
        found = scale(tensor, 0.25)
        assert torch.equal(found, tensor)
        found.square().sum().backward()
        assert torch.equal(tensor.grad, 0.5 * tensor)
