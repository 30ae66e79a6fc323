"""A basis for several layers: low rank where it serves one, the best one where it serves more."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.strategies.factoring.matrices import largest_rank

DEPTH = 5


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 10) for _ in range(DEPTH))

    def forward(self, x):
        return torch.stack([layer(x).tanh() for layer in self.layers]).sum(0)


def network():
    torch.manual_seed(0)
    return Stacked().double()


def basis(**options):
    return memfold.compress(network(), "basis", **options)


def weights_of(model):
    return [layer.weight.detach() for layer in memfold.densify(model).layers]


def test_groups_of_one_are_low_rank():
    found = weights_of(basis(group_size=1, ratio=3 * 22 / 120))
    low_rank = memfold.compress(network(), "low_rank", ratio=3 * 22 / 120)
    assert compression_of(low_rank).ranks == [3] * DEPTH
    for one, other in zip(found, weights_of(low_rank), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_the_error_is_what_the_dropped_singular_values_are(group_size):
    model, before = basis(group_size=group_size, ratio=0.4), weights_of(network())
    compression = compression_of(model)
    error = sum((a - b).square().sum() for a, b in zip(weights_of(model), before, strict=True))
    dropped = 0.0
    for group in compression.groups:
        values = torch.linalg.svdvals(torch.cat([before[index] for index in group]))
        dropped += values[compression.ranks[group[0]] :].square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-9, atol=0)
    rank, groups = compression.ranks[0], len(compression.groups)
    assert compression.num_values == groups * rank * 12 + DEPTH * rank * 10
    assert abs(compression.num_values / 600 - 0.4) < (groups * 12 + DEPTH * 10) / 600 / 2 + 1e-9


def test_more_layers_to_a_basis_allow_a_larger_rank():
    ranks = [compression_of(basis(group_size=n, ratio=0.5)).ranks[0] for n in (1, 2, 5)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[2] <= largest_rank((50, 12))


@pytest.mark.parametrize(
    ("depth", "group_size", "rows", "columns"), [(9, 8, 8, 64), (3, 2, 16, 16), (5, 3, 6, 30)]
)
def test_a_short_last_group_is_smaller_than_its_dense_weights(depth, group_size, rows, columns):
    def layers():
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(depth))

    compression = compression_of(
        memfold.compress(layers(), "basis", group_size=group_size, ratio=1.0)
    )
    assert len(compression.groups[-1]) == depth % group_size
    for group in compression.groups:
        stacked = len(group) * rows, columns
        assert compression.ranks[group[0]] == largest_rank(stacked)
    assert compression.num_values < depth * rows * columns


class Row(nn.Module):
    """Layers one after the other: each sees other inputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() + x
        return x


def row():
    torch.manual_seed(3)
    return Row().double()


def batches(num_samples=64, size=16):
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(num_samples, 10, generator=generator, dtype=torch.float64) @ mixed
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def inputs_of(model):
    """What each layer of a dense model sees on all samples."""
    seen = [[] for _ in model.layers]
    for layer, found in zip(model.layers, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
    for x, _ in batches():
        model(x)
    return [torch.cat(found).detach() for found in seen]


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_nearest_outputs_leave_the_dropped_singular_values_of_the_outputs(group_size):
    dense, errors = row(), {}
    inputs = inputs_of(row())
    for nearest in ("weights", "outputs"):
        options = {"group_size": group_size, "nearest": nearest, "data": batches()}
        model = memfold.compress(row(), "basis", ratio=0.5, **options)
        found, compression = weights_of(model), compression_of(model)
        errors[nearest] = dropped = 0.0
        for group in compression.groups:
            x = torch.cat([inputs[i] for i in group])
            differences = torch.cat([dense.layers[i].weight.detach() - found[i] for i in group])
            errors[nearest] += (x @ differences.T).square().sum()
            stacked = torch.cat([dense.layers[i].weight.detach() for i in group])
            values = torch.linalg.svdvals(x @ stacked.T)
            dropped += values[compression.ranks[group[0]] :].square().sum()
    torch.testing.assert_close(errors["outputs"], dropped, rtol=1e-8, atol=1e-10)
    assert errors["outputs"] < errors["weights"]


def test_nearest_outputs_need_no_definite_moments_and_leave_the_model_as_it_is():
    model = row().train()
    memfold.compress(model, "basis", ratio=0.5, nearest="outputs", data=batches(num_samples=3))
    assert all(module.training for module in model.modules())
    assert all(weight.isfinite().all() for weight in weights_of(model))
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (row, None, "compression=basis needs batches of data"),
        (encoder, batches(), "in_proj_weight is of MultiheadAttention: moments of inputs are"),
    ],
)
def test_nearest_outputs_without_data_or_linear_layers_are_refused(model, data, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(model(), "basis", nearest="outputs", data=data)


def test_gradients_are_those_of_the_factors():
    model = basis(group_size=2, ratio=0.5)
    dense = memfold.densify(model)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for network_ in (model, dense):
        network_(x).square().sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-12}
    for first, group in ((0, (0, 1)), (2, (2, 3)), (4, (4,))):
        shared = model.layers[first].weight_basis
        mixes = {i: model.layers[i].weight_mix for i in group}
        expected = sum(mixes[i].detach().T @ dense.layers[i].weight.grad for i in group)
        torch.testing.assert_close(shared.grad, expected, **close)
        for i in group:
            expected = dense.layers[i].weight.grad @ shared.detach().T
            torch.testing.assert_close(mixes[i].grad, expected, **close)


def test_an_artifact_comes_back(tmp_path):
    model = basis(ratio=0.3)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", network())
    for one, other in zip(weights_of(loaded), weights_of(model), strict=True):
        assert torch.equal(one, other)
