"""Scaled gradients: the same numbers forwards, in transforms and through the compiler too."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from memfold.strategies.layers.gradients import scale_gradient


def _squares(tensor):
    return scale_gradient(tensor, 0.25).square().sum()


def test_transforms_see_the_scaled_gradient():
    tensor = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = 0.5 * tensor
    assert torch.equal(func.grad(_squares)(tensor), expected)
    assert torch.equal(func.vmap(func.grad(_squares))(tensor), expected)
    twice = func.jacrev(func.grad(lambda t: (scale_gradient(t, 0.25) ** 3).sum()))(tensor[0])
    assert torch.equal(twice, torch.diag(0.25 * 0.25 * 6 * tensor[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_tangents_are_those_of_the_same_numbers():
    tensor, tangent = torch.rand(2, 5, dtype=torch.float64).unbind()
    _, found = func.jvp(lambda t: scale_gradient(t, 0.25), (tensor,), (tangent,))
    assert torch.equal(found, tangent)
    with forward_ad.dual_level():
        dual = scale_gradient(forward_ad.make_dual(tensor, tangent), 0.25)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)


def test_gradients_of_gradients_are_scaled_twice():
    tensor = torch.rand(5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        (scale_gradient(tensor, 0.25) ** 3).sum(), tensor, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), tensor)
    torch.testing.assert_close(second, 0.25 * 0.25 * 6 * tensor.detach(), rtol=1e-12, atol=0)


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
