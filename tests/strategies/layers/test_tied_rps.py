"""Tied layers in one shared vector: against each alone, and against explicit matrices."""

import copy

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from reference.sharing import explicit_map, sharing_matrices

DEPTH = 6
MAPS = [{"map": "cycle"}, {"map": (0, 1, 1, 2, 0, 3)}]
WAYS = [{"autograd": way} for way in ("whole", "lean", "classic")]
WAYS += [{"autograd": "lean", "linear": way} for way in ("windows", "correlation")]


def gpt(tied_head=True):
    torch.manual_seed(0)
    return GPT(23, 12, width=16, depth=DEPTH, num_heads=2, tied_head=tied_head).double()


def tokens():
    return torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    out = model(tokens())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).mean() + out.square().mean()


def small(ratio, **options):
    """A model for which explicit matrices have few entries, its inputs, S and Gamma."""
    torch.manual_seed(3)
    equal = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(DEPTH)]
    dense = nn.Sequential(nn.Linear(5, 4), nn.Sequential(*equal), nn.Linear(4, 3)).double()
    model = both(copy.deepcopy(dense), ratio=ratio, **options)
    shared = compression_of(model)
    places = zip(shared.mapping.spans, shared.scales, strict=True)
    scales = torch.cat([torch.full((span.numel,), scale).double() for span, scale in places])
    scale = options.get("gradient_scale", "none")
    return dense, model, *sharing_matrices(explicit_map(shared.mapping), scales, scale, None)


def both(model=None, **options):
    return memfold.compress(gpt() if model is None else model, "tied_rps", **options)


def trained(model, optimizer):
    optimizer = optimizer(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return memfold.densify(model).state_dict()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("chosen", MAPS, ids=str)
def test_with_as_many_values_as_tied_layers_have_it_trains_as_they_do(chosen, options, optimizer):
    ratio = {"ratio": 0.5} if chosen["map"] == "cycle" else {}
    alone = memfold.compress(gpt(), "tied", **chosen, **ratio)
    model = both(ratio=1.0, **chosen, **options)
    assert memfold.footprint(model).num_values == memfold.footprint(alone).num_values
    states = [trained(network, OPTIMIZERS[optimizer]) for network in (alone, model)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_with_layers_of_their_own_it_is_stable_rps_bit_for_bit(options):
    models = [
        memfold.compress(gpt(), "stable_rps", ratio=0.3, **options),
        both(ratio=0.3, map=(0, 1, 2, 3, 4, 5), **options),
    ]
    states = [trained(network, OPTIMIZERS["sgd"]) for network in models]
    if options != {"autograd": "whole"}:  # that one sums tensor by tensor here, in another order
        assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gradient_scale", ["length", "projection", "none"])
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("chosen", MAPS, ids=str)
def test_weights_and_gradient_are_those_of_the_explicit_matrices(chosen, options, gradient_scale):
    options = {**chosen, **options, "gradient_scale": gradient_scale}
    _, model, matrix, gamma = small(0.2, **options)
    shared, dense = compression_of(model), memfold.densify(model)
    weights = [dense.get_parameter(name) for name in shared.names]
    torch.testing.assert_close(torch.cat([w.flatten() for w in weights]), matrix @ shared.values)
    inputs = torch.linspace(-1, 2, 35).double().view(7, 5)
    for network in (dense, model):
        network(inputs).square().sum().backward()
    of_weights = torch.cat([weight.grad.flatten() for weight in weights])
    torch.testing.assert_close(shared.values.grad, gamma * (matrix.T @ of_weights))


@pytest.mark.parametrize("chosen", MAPS, ids=str)
def test_layers_of_one_class_read_the_same_numbers_and_others_do_not(chosen):
    model = both(ratio=0.2, **chosen)
    entries = (0, 1, 2, 0, 1, 2) if chosen["map"] == "cycle" else chosen["map"]
    for name in ("attention.qkv", "down"):
        weights = [block.get_submodule(name).weight for block in model.blocks]
        for one, first in zip(weights, entries, strict=True):
            for other, second in zip(weights, entries, strict=True):
                assert torch.equal(one, other) == (first == second)


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_a_start_by_least_squares_is_that_of_the_explicit_matrix(ratio):
    dense, model, matrix, _ = small(ratio, initial_values="least_squares")
    shared = compression_of(model)
    weights = torch.cat([dense.get_parameter(name).detach().flatten() for name in shared.names])
    expected = torch.linalg.lstsq(matrix, weights[:, None]).solution[:, 0]
    torch.testing.assert_close(shared.values.detach(), expected)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("loops", [2, 3, 6])
def test_a_file_is_as_full_as_one_of_stable_rps(loops, bits, tmp_path):
    path, sizes = tmp_path / "model.safetensors", []
    budget = 100 + memfold.save(both(gpt().float(), ratio=0.1, loops=loops, bits=bits), path)
    for name, options in (("stable_rps", {}), ("tied_rps", {"loops": loops})):
        model = memfold.compress(gpt().float(), name, budget_bytes=budget, bits=bits, **options)
        sizes.append(memfold.save(model, path))
    unit = 8 + 2 * (bits < 16)  # headers end at multiples of 8; a block's scale has 2 bytes
    assert all(budget - unit <= size <= budget for size in sizes)


def test_a_budget_for_more_than_tied_layers_have_is_left_in_part(tmp_path):
    model = both(loops=6, budget_bytes=10**6)
    assert memfold.footprint(model).num_values == 23 * 16 + 12 * 16 * 16
    assert memfold.save(model, tmp_path / "model.safetensors") < 60_000


@pytest.mark.parametrize("tied_head", [True, False])
def test_copies_artifacts_checkpoints_and_densified_models_compute_the_same(tied_head, tmp_path):
    model = both(gpt(tied_head), ratio=0.2)
    trained(model, OPTIMIZERS["adamw"])
    model.eval()
    memfold.save(model, tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = both(gpt(tied_head), ratio=0.2, initial_values="least_squares").eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    loaded = memfold.load(tmp_path / "model.safetensors", gpt(tied_head)).eval()
    dense = memfold.densify(model)
    with torch.no_grad():
        expected = model(tokens())
        for other in (loaded, again, copy.deepcopy(model), dense):
            assert torch.equal(other(tokens()), expected)
    assert dense.state_dict().keys() == gpt(tied_head).state_dict().keys()
    first, fourth = (dense.blocks[place].down.weight for place in (0, 3))
    assert first.data_ptr() != fourth.data_ptr()
    gpt(tied_head).load_state_dict(dense.state_dict())


def test_generation_with_a_cache_is_that_without_one():
    model = both(ratio=0.2).eval()
    cache = []
    with torch.no_grad():
        steps = [model(tokens()[:, i : i + 1], cache) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens()), rtol=1e-12, atol=1e-12)
    assert len(cache) == DEPTH


def test_values_of_another_map_are_refused():
    values = both(ratio=0.2, map=[0, 1, 0, 1, 0, 1]).state_dict()
    with pytest.raises(RuntimeError, match="folded with another strategy, seed, ratio"):
        both(ratio=0.2, map=[0, 1, 1, 0, 0, 1]).load_state_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": 4}, r"compression\.loops=4: 6 layers in compression\.map=cycle can share in"),
        ({"map": [0, 1]}, "has 2 entries"),
        ({"linear": "windows", "autograd": "whole"}, "builds no weight"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(memfold.InputError, match=message):
        both(ratio=0.2, **options)


def test_models_without_repeated_layers_are_refused():
    with pytest.raises(memfold.InputError, match="has no repeated layers"):
        both(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_trained_weights_that_go_are_reported(ratio):
    model = gpt()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(torch.linspace(0.1, 3, len(parameter))[:, None])
                parameter.mul_(torch.linspace(0.1, 3, parameter.shape[1]))
    with pytest.warns(UserWarning, match="tied_rps keeps none of their values"):
        both(model, ratio=ratio)
