"""Clipping by the length of the step that the dense weights take."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from strategies.cases import SHARING, STRATEGIES


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).double()


def backward(model):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    model(x).square().sum().backward()
    return model


def flat(model):
    return torch.cat([p.detach().flatten() for p in memfold.densify(model).parameters()])


@pytest.mark.parametrize("initial_scale", [None, 0.3])
@pytest.mark.parametrize("gradient_scale", ["length", "projection", "none"])
@pytest.mark.parametrize("strategy", SHARING)
def test_the_norm_is_that_of_the_step_of_the_weights(strategy, gradient_scale, initial_scale):
    options = STRATEGIES[strategy].options
    options = {**options, "gradient_scale": gradient_scale, "initial_scale": initial_scale}
    norms = []
    for clipped in (False, True):
        model = backward(memfold.compress(network(), strategy, ratio=0.3, **options))
        before = flat(model)
        norm = memfold.clip_grad_norm_(model, 0.25 if clipped else 1e9)
        torch.optim.SGD(model.parameters(), 1.0).step()
        norms.append(float((flat(model) - before).norm()))
    assert norms[0] == pytest.approx(float(norm), rel=1e-9)
    # The guard against a division by zero takes a millionth.
    assert norms[1] == pytest.approx(0.25, rel=1e-5)


def test_what_is_kept_to_clip_is_counted():
    model = backward(memfold.compress(network(), "hashednet", ratio=0.3))
    compression = compression_of(model)
    before = compression.resident_bytes
    memfold.clip_grad_norm_(model, 1.0)
    assert compression.resident_bytes == before + compression._reach[1].nbytes > before


def test_ratio_one_and_dense_models_are_clipped_as_torch_does():
    dense = backward(network())
    shared = backward(memfold.compress(network(), "stable_rps", ratio=1.0))
    same = backward(memfold.compress(network(), "dense"))
    expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
    for model in (shared, same, backward(network())):
        torch.testing.assert_close(memfold.clip_grad_norm_(model, 0.5), expected)
        torch.optim.SGD(model.parameters(), 0.1).step()
    torch.optim.SGD(dense.parameters(), 0.1).step()
    torch.testing.assert_close(flat(shared), flat(dense))


def test_a_threshold_means_the_same_at_every_ratio():
    # Of one loss at one point: the vector's own gradient is shorter the fewer numbers it has.
    norms, own = [], []
    for ratio in (0.5, 0.05):
        model = memfold.compress(network(), "stable_rps", ratio=ratio)
        backward(model)
        own.append(float(compression_of(model).values.grad.norm()))
        norms.append(float(memfold.clip_grad_norm_(model, 1.0)))
    assert 0.3 < norms[1] / norms[0] < 3
    assert own[1] / own[0] < 0.7 * norms[1] / norms[0]


def test_a_threshold_of_zero_is_refused():
    with pytest.raises(memfold.InputError, match="max_norm must be above 0, got 0"):
        memfold.clip_grad_norm_(network(), 0)
