"""What the shared vector starts from: the values that come nearest to the dense weights."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from reference.sharing import explicit_map, sharing_matrices
from strategies.cases import SHARING, options_of


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
