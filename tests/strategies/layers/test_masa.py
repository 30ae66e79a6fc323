"""Atoms across depth: exact at both ends, gradients by the chain rule, fits by singular values."""

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.compression.strategy import Strategy
from memfold.strategies.layers.atoms import legendre

DEPTH = 6
NAME = "attention.qkv.weight"


def gpt():
    torch.manual_seed(0)
    return GPT(23, 12, width=16, depth=DEPTH, num_heads=2).double()


def tokens():
    return torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    out = model(tokens())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).mean() + out.square().mean()


def masa(model=None, **options):
    return memfold.compress(gpt() if model is None else model, "masa", **options)


def layers_of(model):
    dense = memfold.densify(model).state_dict()
    return torch.stack([dense[f"blocks.{depth}.{NAME}"] for depth in range(DEPTH)])


def part(model, depth, name):
    return getattr(model.blocks[depth].attention.qkv, f"weight_{name}")


@pytest.mark.parametrize("initial_values", ["random", "least_squares"])
def test_as_many_atoms_as_layers_are_the_plain_model(initial_values):
    model = masa(ratio=1.0, initial_values=initial_values)
    assert compression_of(model).num_atoms == DEPTH
    exact = initial_values == "random"
    torch.testing.assert_close(
        model(tokens()), gpt()(tokens()), rtol=0 if exact else 1e-10, atol=0 if exact else 1e-12
    )


def test_one_atom_is_one_weight_for_all_layers():
    found = layers_of(masa(ratio=0.001))
    assert all(torch.equal(layer, found[0]) for layer in found)


@pytest.mark.parametrize("gains", [False, True])
def test_gradients_follow_the_chain_rule(gains):
    model = masa(ratio=0.5, gains=gains)
    with torch.no_grad():
        for depth in range(DEPTH):
            part(model, depth, "coefficients").normal_()
            if gains:
                part(model, depth, "gains").normal_()
    dense = memfold.densify(model)
    loss_of(model).backward()
    loss_of(dense).backward()
    of_weights = [dense.blocks[d].attention.qkv.weight.grad for d in range(DEPTH)]
    atoms = part(model, 0, "atoms").detach()
    mixes = [part(model, d, "coefficients").detach() for d in range(DEPTH)]
    ones = torch.ones(len(atoms), atoms.shape[1], dtype=atoms.dtype)
    factors = [part(model, d, "gains").detach() if gains else ones for d in range(DEPTH)]
    expected = sum(
        mix[:, None, None] * factor[:, :, None] * grad
        for mix, factor, grad in zip(mixes, factors, of_weights, strict=True)
    )
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(part(model, 0, "atoms").grad, expected, **close)
    for depth, (mix, factor, grad) in enumerate(zip(mixes, factors, of_weights, strict=True)):
        products = atoms * grad
        found = part(model, depth, "coefficients").grad
        torch.testing.assert_close(found, (factor[:, :, None] * products).sum((1, 2)), **close)
        if gains:
            expected = mix[:, None] * products.sum(2)
            torch.testing.assert_close(part(model, depth, "gains").grad, expected, **close)


def test_another_basis_of_the_atoms_changes_nothing():
    model = masa(ratio=0.5)
    expected = layers_of(model)
    change = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        atoms = part(model, 0, "atoms")
        atoms.copy_(torch.tensordot(change.T, atoms, 1))
        for depth in range(DEPTH):
            mix = part(model, depth, "coefficients")
            mix.copy_(torch.linalg.solve(change, mix))
    torch.testing.assert_close(layers_of(model), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_atoms", [1, 2, 4])
def test_the_error_of_a_fit_is_what_the_dropped_singular_values_are(num_atoms):
    model = masa(ratio=num_atoms / DEPTH, initial_values="least_squares")
    before = torch.stack([block.attention.qkv.weight.detach() for block in gpt().blocks])
    values = torch.linalg.svdvals(before.flatten(1))
    error = (layers_of(model) - before).square().sum()
    torch.testing.assert_close(error, values[num_atoms:].square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("coefficients", ["trained", "network", "polynomial"])
def test_what_is_stored_is_the_closed_form_and_comes_back(coefficients, gains, tmp_path):
    options = {"coefficients": coefficients, "gains": gains}
    model = masa(ratio=0.5, **options)
    atoms, rows = compression_of(model).num_atoms, 3 * 16
    per_layer = (0 if coefficients == "polynomial" else atoms) + (atoms * rows if gains else 0)
    assert compression_of(model).num_values == atoms * rows * 16 + DEPTH * per_layer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", gpt()).eval()
    with torch.no_grad():
        expected = model.eval()(tokens())
        for other in (loaded, memfold.densify(model)):
            torch.testing.assert_close(other(tokens()), expected, rtol=1e-12, atol=1e-12)


def test_a_network_of_coefficients_starts_as_none_and_is_not_stored(tmp_path):
    model, plain = masa(ratio=0.5, coefficients="network"), masa(ratio=0.5)
    assert torch.equal(layers_of(model), layers_of(plain))
    loss_of(model).backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    assert not torch.equal(layers_of(model)[0], layers_of(model)[1])
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", gpt())
    values = sum(tensor.numel() for tensor in loaded.parameters())
    assert values == sum(tensor.numel() for tensor in plain.parameters())
    for depth in range(DEPTH):
        found = part(loaded, depth, "coefficients").detach()
        names = ("first", "second", "third")
        first, second, third = (part(model, 0, name).detach() for name in names)
        hidden = nn.functional.gelu(first @ part(model, depth, "embedding").detach())
        mixed = third @ nn.functional.gelu(second @ hidden) / 64
        mixed[depth // 2] += 1
        torch.testing.assert_close(found, mixed, rtol=1e-12, atol=1e-12)
    memfold.save(loaded, tmp_path / "again.safetensors")
    again = memfold.load(tmp_path / "again.safetensors", gpt())
    assert torch.equal(layers_of(again), layers_of(loaded))


def test_what_a_file_holds_is_trained_on_as_it_is_also_where_it_names_a_network():
    saved = compression_of(masa(ratio=0.5))
    network = Strategy.from_dict({"name": "masa", "ratio": 0.5, "coefficients": "network"})
    tensors = {**saved.value_tensors(), **saved.index_tensors()}
    network.restore(model := gpt(), saved.names, saved.num_values, tensors)
    assert torch.equal(layers_of(model), layers_of(masa(ratio=0.5)))
    assert part(model, 0, "coefficients").requires_grad


@pytest.mark.parametrize("options", [{"train_bits": 4}, {"initial_values": "least_squares"}])
def test_a_network_of_coefficients_is_neither_rounded_nor_fitted(options):
    with pytest.raises(memfold.InputError, match="coefficients=network takes neither"):
        masa(coefficients="network", **options)


def test_polynomials_are_those_of_legendre_and_span_all_layers():
    found = legendre(12, 6)
    assert torch.equal(found[:, 0], torch.ones(12, dtype=torch.float64))
    assert float(torch.linalg.cond(found)) == pytest.approx(3.2, abs=0.05)
    assert float(torch.linalg.cond(legendre(12, 12))) == pytest.approx(68, abs=1)
    model = masa(ratio=1.0, coefficients="polynomial", initial_values="least_squares")
    torch.testing.assert_close(model(tokens()), gpt()(tokens()), rtol=1e-9, atol=1e-10)


def test_kinds_of_projections_are_found_by_their_names():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = masa(nn.TransformerEncoder(layer, 3), ratio=0.5, include=["q", "o"])
    names = compression_of(model).names
    assert {name.partition(".self_attn.")[2] for name in names} == {
        "in_proj_weight",
        "out_proj.weight",
    }
    with pytest.raises(memfold.InputError, match=r"include=q: no weight of this model"):
        masa(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
