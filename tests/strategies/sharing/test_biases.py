"""Biases of layers in the shared vector (`compression.share_biases=true`)."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import memfold
from memfold.compression import compression_of

SHARING = ("stable_rps", "roast", "hashednet")


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = (
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.LayerNorm(24), nn.Linear(24, 5)),
    )
    return nn.Sequential(*layers).double()


def images() -> torch.Tensor:
    return torch.randn(7, 2, 4, 4, dtype=torch.float64)


def share(model: nn.Module, strategy: str = "stable_rps", **options: object) -> nn.Module:
    return memfold.compress(model, strategy, **{"ratio": 0.3, "share_biases": True, **options})


@pytest.mark.parametrize("autograd", ["lean", "whole", "classic"])
@pytest.mark.parametrize("strategy", SHARING)
def test_weights_and_biases_are_views_and_fold_their_gradients(strategy, autograd):
    model, batch = network(), images()
    compression = compression_of(share(model, strategy, autograd=autograd, gradient_scale="none"))
    assert [name for name in compression.names if name.endswith("bias")] == [
        *("0.bias", "3.bias", "6.bias", "8.bias")
    ]
    phi = model.shared_values.detach()
    sources = [compression.sources(index) for index in range(len(compression.names))]
    dense = {
        name: (phi[places] * factors).requires_grad_()
        for name, (places, factors) in zip(compression.names, sources, strict=True)
    }
    model(batch).square().sum().backward()
    functional_call(network(), dense, (batch,)).square().sum().backward()
    folded = torch.zeros_like(phi)
    for weight, (places, factors) in zip(dense.values(), sources, strict=True):
        folded.index_add_(0, places.flatten(), (weight.grad * factors).flatten())
    torch.testing.assert_close(model.shared_values.grad, folded, rtol=1e-10, atol=1e-10)


def test_at_ratio_one_the_biases_are_those_of_the_dense_model():
    dense, model = network(), share(network(), ratio=1.0)
    for name in ("0", "3", "6", "8"):
        found, expected = model.get_submodule(name).bias, dense.get_submodule(name).bias
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_biases_of_zero_start_as_random_as_the_weights_beside_them():
    model = nn.Sequential(nn.Linear(400, 3), nn.LSTM(3, 2))
    model.alone_bias = nn.Parameter(torch.zeros(12))
    zeros = [tensor for name, tensor in model.named_parameters() if "bias" in name]
    for tensor in zeros:
        nn.init.zeros_(tensor)
    spreads = {n: t.std().item() for n, t in model.named_parameters() if "weight" in n}
    compression = compression_of(share(model))
    scales = dict(zip(compression.names, compression.scales, strict=True))
    for name in ("0.bias", "1.bias_ih_l0", "1.bias_hh_l0"):
        beside = spreads[name.replace("bias", "weight")]
        assert scales[name] == pytest.approx(beside) == scales[name.replace("bias", "weight")]
    assert scales["alone_bias"] == pytest.approx(36**-0.5)


def test_a_tied_bias_is_that_of_the_layer_that_has_a_weight():
    model = nn.Sequential(nn.Linear(5, 4))
    model.bias = model[0].bias
    nn.init.zeros_(model.bias)
    spread = model[0].weight.std().item()
    compression = compression_of(share(model))
    assert compression.scales == pytest.approx([spread, spread])


@pytest.mark.parametrize("module", [nn.LSTM(6, 5), nn.MultiheadAttention(6, 2)], ids=type)
def test_layers_with_several_biases(module):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            return self.layer(x)[0] if isinstance(module, nn.LSTM) else self.layer(x, x, x)[0]

    model, x = Model(), torch.randn(4, 3, 6)
    share(model)
    found = model(x)
    found.sum().backward()
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    torch.testing.assert_close(memfold.densify(model)(x), found)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("strategy", [*SHARING, "subspace"])
def test_artifact(strategy, bits, tmp_path):
    model, batch, file = share(network(), strategy).eval(), images(), tmp_path / "m.safetensors"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    memfold.save(model, file, bits=bits)
    loaded, dense = memfold.load(file, network()), memfold.load(file, network(), form="dense")
    torch.testing.assert_close(loaded.eval()(batch), dense.eval()(batch))
    error = (loaded(batch) - model(batch)).abs().max()
    assert error == 0 if bits == 32 else 0 < error < 0.05


@pytest.mark.parametrize("strategy", ["stable_rps", "hashednet", "subspace"])
def test_a_budget_buys_the_bytes_of_the_biases(strategy, tmp_path):
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 100))

    counts = {}
    for shares in (False, True):
        shared = memfold.compress(model(), strategy, budget_bytes=6000, share_biases=shares)
        assert 5990 < memfold.save(shared, tmp_path / str(shares)) <= 6000
        counts[shares] = compression_of(shared).num_values
    # 400 numbers, less a scale for each of the two biases and their names in the header.
    assert 350 < counts[True] - counts[False] < 400


def test_error_feedback_makes_up_for_weights_whose_values_biases_use_too(tmp_path):
    model, batch = share(network().float()).eval(), images().float()
    errors = []
    for data in (None, [(batch, torch.zeros(7))]):
        memfold.save(model, tmp_path / "m", bits=4, data=data)
        loaded = memfold.load(tmp_path / "m", network().float()).eval()
        errors.append((loaded(batch) - model(batch)).square().sum().item())
    assert errors[1] < errors[0]


def test_tied_layers_have_their_biases_in_one_place():
    def model() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    shared, x = share(model(), "tied_rps", layers="layers.*").eval(), torch.randn(2, 5, 16)
    biases = [layer.linear1.bias for layer in shared.layers]
    assert torch.equal(biases[0], biases[2])
    assert not torch.equal(biases[0], biases[1])
    torch.testing.assert_close(memfold.densify(shared)(x), shared(x))


def test_a_model_without_values_gives_its_biases_too():
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))

    torch.manual_seed(5)
    dense = share(model(), ratio=1.0)
    with torch.device("meta"):
        empty = model()
    torch.manual_seed(5)
    torch.testing.assert_close(share(empty, ratio=1.0).shared_values, dense.shared_values)
