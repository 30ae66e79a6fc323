"""The scales are standard deviations, whatever the size, layout and dtype of a tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memfold.compression import initial_scale
from memfold.compression.initial_scale import initial_scale_of
from memfold.compression.selection import select_weights
from memfold.errors import InputError

CHUNK = initial_scale._CHUNK_NUMEL


def scale_of(tensor):
    module = nn.Module()
    module.weight = nn.Parameter(tensor)
    (weight,) = select_weights(module)
    return initial_scale_of(weight)


def expected(tensor):
    return float(tensor.double().std().float())


@given(
    rows=st.integers(1, 7),
    columns=st.sampled_from([2, 3, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]),
    mean=st.sampled_from([0.0, 1e-6, 3.0, -1e4]),
    spread=st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
    seed=st.integers(0, 10),
)
def test_it_equals_the_textbook(rows, columns, mean, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=generator) * spread + mean
    if bool((tensor == tensor[0, 0]).all()):
        return
    assert scale_of(tensor) == pytest.approx(expected(tensor), rel=2e-7)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(300, 700).T,
        torch.randn(40, 60)[::2, 3:50],
        torch.randn(3, 1, 5).expand(3, 1, 5),
        torch.randn(20, 30, dtype=torch.float64),
        torch.randn(20, 30).bfloat16(),
        torch.randn(20, 30).half(),
        torch.cat((torch.zeros(CHUNK), torch.ones(CHUNK + 7))).view(1, -1),
    ],
    ids=["channels_last", "transposed", "slice", "one", "float64", "bfloat16", "float16", "steps"],
)
def test_layouts_and_dtypes(tensor):
    assert scale_of(tensor) == pytest.approx(expected(tensor), rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -2.3, 1e-30, 7e20])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, CHUNK + 3)])
def test_a_constant_tensor_has_its_absolute_value(shape, value, dtype):
    tensor = torch.full(shape, value, dtype=dtype)
    assert scale_of(tensor) == tensor.float().abs().flatten()[0].item()


def test_zeros_have_the_scale_of_a_usual_initialisation():
    assert scale_of(torch.zeros(7, 4, 3)) == pytest.approx(1 / 6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, CHUNK + 2])
def test_a_weight_that_is_not_finite_is_found(place, value):
    tensor = torch.ones(1, 2 * CHUNK)
    tensor[0, place] = value
    with pytest.raises(InputError, match="not finite"):
        scale_of(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_leaves_the_weights_alone(dtype):
    tensor = torch.randn(3, 5, dtype=dtype) + 2
    before = tensor.clone()
    scale_of(tensor)
    assert torch.equal(tensor, before)
