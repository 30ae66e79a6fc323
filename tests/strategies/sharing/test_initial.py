"""The scales are standard deviations, whatever the size, layout and dtype of a tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.compression.selection import select_weights
from memfold.errors import InputError
from memfold.strategies.sharing import initial
from memfold.strategies.sharing.initial import initial_scale_of
from reference.sharing import explicit_map, sharing_matrices
from strategies.cases import SHARING, options_of

CHUNK = initial._CHUNK_NUMEL


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


@pytest.mark.parametrize("initial_scale", [None, 0.3])
@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("strategy", SHARING)
def test_least_squares_are_those_of_the_explicit_matrix(strategy, ratio, initial_scale):
    torch.manual_seed(5)
    # The padding row is zero, counts as such, and stays it.
    embedding = nn.Embedding(4, 5, padding_idx=1)
    model = nn.Sequential(embedding, nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    dense = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    options = options_of(strategy, ratio=ratio) | {"initial_scale": initial_scale}
    memfold.compress(model, strategy, initial_values="least_squares", **options)
    shared = compression_of(model)
    scales = torch.cat(
        [
            torch.full((span.numel,), scale, dtype=torch.float64)
            for span, scale in zip(shared.mapping.spans, shared.scales, strict=True)
        ]
    )
    signed = explicit_map(shared.mapping)
    matrix, _ = sharing_matrices(signed, scales, "none", initial_scale)
    # The driver gives slots without a weight 0.
    expected = torch.linalg.lstsq(matrix, dense[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(shared.values.detach(), expected)


def test_values_mean_the_same_whatever_they_started_from():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    memfold.compress(model, "stable_rps", ratio=0.3, initial_values="least_squares")
    other = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    memfold.compress(other, "stable_rps", ratio=0.3).load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
