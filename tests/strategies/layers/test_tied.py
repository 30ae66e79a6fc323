"""Tied layers against plain ones, and against copies whose gradients are summed."""

import copy
import math

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.compression.strategy import Context
from memfold.errors import InputError
from memfold.strategies.layers.tied import Tied

DEPTH = 6


def gpt():
    torch.manual_seed(0)
    return GPT(23, 12, width=16, depth=DEPTH, num_heads=2).double()


def tokens():
    return torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    out = model(tokens())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).mean() + out.square().mean()


def tied(**options):
    return memfold.compress(gpt(), "tied", **options)


def test_as_many_own_layers_as_there_are_is_the_plain_model_bit_for_bit():
    plain, model = gpt(), tied(ratio=1.0)
    for network in (plain, model):
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(network).backward()
            optimizer.step()
    assert torch.equal(plain(tokens()), model(tokens()))
    dense = memfold.densify(model).state_dict()
    assert all(torch.equal(dense[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("loop_scale", [False, True])
@pytest.mark.parametrize("gradient_scale", ["length", "projection", "none"])
@pytest.mark.parametrize("entries", [(0, 1, 2, 0, 1, 2), (0, 1, 1, 1, 1, 5), (0, 0, 0, 0, 0, 0)])
def test_a_gradient_is_the_scaled_sum_of_those_of_copies(entries, gradient_scale, loop_scale):
    model = tied(map=entries, gradient_scale=gradient_scale, loop_scale=loop_scale)
    loss_of(model).backward()
    untied = memfold.densify(model)
    loss_of(untied).backward()
    power = {"length": 0.5, "projection": 1, "none": 0}[gradient_scale]
    copies, parameters = dict(untied.named_parameters()), dict(model.named_parameters())
    for name, parameter in parameters.items():
        path, _, part = name.rpartition("_")
        if part == "tied":
            first = int(path.split(".")[1])
            names = [
                path.replace(f".{first}.", f".{place}.", 1)
                for place, entry in enumerate(entries)
                if entry == entries[first]
            ]
            total = sum(copies[name].grad for name in names) / len(names) ** power
            torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-12)
        elif part == "scale":
            weight, gradient = copies[path].detach(), copies[path].grad
            expected = (weight * gradient).sum(1, keepdim=True)  # all scales are 1
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)
        else:
            torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "own"),
    [({"ratio": 1 / 3}, 2), ({"ratio": 0.6, "map": "middle_cycle"}, 4), ({"map": "albert"}, 1)],
)
def test_what_is_stored_is_the_closed_form(options, own):
    model, plain = tied(**options), gpt()
    layer = sum(p.numel() for p in plain.blocks[0].parameters() if p.dim() >= 2)
    other = sum(p.numel() for p in plain.parameters() if p.dim() >= 2) - DEPTH * layer
    compression = compression_of(model)
    assert compression.num_values == other + own * layer
    assert compression.index_bytes == 0
    distinct = {id(p): p.numel() for p in model.parameters() if p.dim() >= 2}
    assert sum(distinct.values()) == other + own * layer


def test_the_nearest_number_of_layers_is_taken_and_a_budget_is_never_exceeded(tmp_path):
    found = [compression_of(tied(ratio=ratio)).map for ratio in (0.9, 0.55, 0.3, 0.001)]
    assert [max(entries) + 1 for entries in found] == [6, 3, 2, 1]


def test_a_budget_is_met_by_the_file_and_the_smallest_one_is_named(tmp_path):
    def size(budget):
        path = tmp_path / "model.safetensors"
        return memfold.save(tied(budget_bytes=budget, bits=8), path)

    assert size(20_000) < size(30_000) <= 30_000
    with pytest.raises(memfold.InputError, match="the least of tied for 6 layers") as refused:
        size(8_000)
    least = int(str(refused.value).split("takes ")[1].split()[0])
    assert size(least) <= least
    with pytest.raises(memfold.InputError, match="is too small"):
        size(least - 1)


OPTIONS = [{}, {"loop_scale": True}, {"norms": "shared"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_copies_artifacts_and_densified_models_compute_the_same(options, tmp_path):
    model = tied(ratio=0.4, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.eval()
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", gpt()).eval()
    again = tied(ratio=0.4, **options).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(tokens())
        for other in (loaded, again, copy.deepcopy(model), memfold.densify(model)):
            assert torch.equal(other(tokens()), expected)


def test_shared_norms_are_stored_once_and_dense_models_have_their_own():
    model, own = tied(ratio=1 / 3, norms="shared"), tied(ratio=1 / 3)
    norms = sum(p.numel() for p in gpt().blocks[0].parameters() if p.dim() == 1)
    bytes_of = [memfold.footprint(m).untouched_bytes for m in (own, model)]
    assert memfold.footprint(model).dense_bytes == memfold.footprint(gpt()).dense_bytes
    assert bytes_of[0] - bytes_of[1] == 8 * norms * (DEPTH - 2)
    assert model.blocks[4].norm1.weight is model.blocks[0].norm1.weight
    loss_of(model).backward()
    dense = memfold.densify(model)
    loss_of(dense).backward()
    total = sum(dense.blocks[i].norm1.weight.grad for i in (0, 2, 4))
    torch.testing.assert_close(model.blocks[0].norm1.weight.grad, total, rtol=1e-10, atol=1e-12)
    assert dense.blocks[4].norm1.weight is not dense.blocks[0].norm1.weight
    assert type(dense.state_dict()) is type(gpt().state_dict())
    gpt().load_state_dict(dense.state_dict())


@pytest.mark.parametrize("kind", ["norms", "biases"])
def test_norms_and_biases_are_tied_each_by_its_own_option(kind, tmp_path):
    other = {"norms": "biases", "biases": "norms"}[kind]
    options = {"ratio": 1 / 3, kind: "shared", other: "own"}
    model = tied(**options)
    for name, parameter in model.blocks[0].named_parameters():
        if parameter.dim() == 1:
            is_shared = name.endswith("bias") == (kind == "biases")
            assert (model.blocks[4].get_parameter(name) is parameter) == is_shared, name
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * number)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", gpt()).eval()
    for network in (loaded, memfold.densify(model)):
        assert torch.equal(network.eval()(tokens()), model.eval()(tokens()))
    loss_of(model.train()).backward()
    dense = memfold.densify(model)
    loss_of(dense).backward()
    name = "norm1.weight" if kind == "norms" else "up.bias"
    total = sum(dense.blocks[i].get_parameter(name).grad for i in (0, 2, 4))
    found = model.blocks[0].get_parameter(name).grad
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)


def test_shared_norms_of_layers_with_two_paths_are_loaded(tmp_path):
    def twice():
        model = gpt()
        model.layers = model.blocks
        return model

    model = memfold.compress(twice(), "tied", ratio=1 / 3, norms="shared").eval()
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", twice().double()).eval()
    assert torch.equal(loaded(tokens()), model(tokens()))
    with pytest.raises(memfold.InputError, match="is of another backbone"):
        memfold.load(tmp_path / "model.safetensors", gpt())


def test_excluded_matrices_stay_each_layers_own():
    model = tied(ratio=0.01, exclude=["*.up"], norms="shared")
    one, other = model.blocks[0], model.blocks[3]
    assert other.norm1.weight is one.norm1.weight
    assert other.up.bias is one.up.bias
    assert torch.equal(other.up.weight, gpt().blocks[3].up.weight)


@pytest.mark.parametrize(
    ("block", "found"),
    [(None, [0, 1]), ("average", [2, 3]), ("stepwise", [0, 5]), ("lower", [0, 1])],
)
@pytest.mark.parametrize("name", ["cycle", "sequence"])
def test_shared_norms_start_as_the_weights_do(name, block, found):
    options = {} if block is None else {"initial_values": "least_squares", "block": block}
    model = gpt()
    for number, layer in enumerate(model.blocks):
        for parameter in (layer.norm1.weight, layer.norm2.bias, layer.up.weight):
            nn.init.constant_(parameter, number)
    options |= {"structured": "share", "norms": "shared"}
    memfold.compress(model, "tied", map=name, ratio=1 / 3, **options)
    if name == "sequence":
        found = {None: [0, 3], "average": [1, 4]}.get(block, found)
    for place, own in enumerate(compression_of(model).map):
        layer = model.blocks[place]
        for parameter in (layer.norm1.weight, layer.norm2.bias, layer.up.weight):
            assert torch.equal(parameter, torch.full_like(parameter, found[own]))


@pytest.mark.parametrize("loop_scale", [False, True])
def test_clipping_measures_the_step_of_the_weights(loop_scale):
    def flat(network):
        return torch.cat([p.detach().flatten() for p in memfold.densify(network).parameters()])

    model = tied(ratio=1 / 3, loop_scale=loop_scale)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_tied"))
        if name.endswith("_scale"):
            parameter.data.mul_(torch.linspace(0.5, 2, len(parameter))[:, None])
    loss_of(model).backward()
    before = flat(model)
    norm = memfold.clip_grad_norm_(model, 1e9)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    assert float((flat(model) - before).norm()) == pytest.approx(float(norm), rel=1e-9)


def test_values_of_another_map_are_refused():
    values = tied(map=[0, 1, 0, 1, 0, 1]).state_dict()
    with pytest.raises(RuntimeError, match="these values belong to another"):
        tied(map=[0, 1, 1, 0, 0, 1]).load_state_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map": "circle"}, "compression.map must be"),
        ({"map": [0, 1]}, "has 2 entries"),
        ({"map": [0, 1, 2, 3, 4, 6]}, "names layer 6"),
    ],
)
def test_bad_maps_are_refused(options, message):
    with pytest.raises(memfold.InputError, match=message):
        tied(**options)


def test_two_layers_have_no_middle():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(memfold.InputError, match="needs 3 repeated layers or more"):
        memfold.compress(layers, "tied", map="middle_cycle")


@pytest.mark.parametrize("name", ["cycle", "sequence", "middle_cycle"])
def test_generation_with_a_cache_is_that_without_one(name):
    model = tied(ratio=0.6, map=name).eval()
    cache = []
    with torch.no_grad():
        steps = [model(tokens()[:, i : i + 1], cache) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens()), rtol=1e-12, atol=1e-12)
    assert len(cache) == DEPTH


def test_trained_weights_that_go_are_reported():
    model = gpt()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(torch.linspace(0.1, 3, len(parameter))[:, None])
                    parameter.mul_(torch.linspace(0.1, 3, parameter.shape[1]))
    with pytest.warns(UserWarning, match="keeps those of the first layer"):
        memfold.compress(model, "tied", ratio=math.sqrt(0.1))


def distance(model, others):
    found = zip(memfold.densify(model).state_dict().values(), others, strict=True)
    return sum((a - b).square().sum() for a, b in found)


def test_the_mean_is_the_nearest_start_and_steps_keep_the_ends():
    before = list(gpt().state_dict().values())
    found = {
        block: tied(ratio=0.4, initial_values="least_squares", block=block)
        for block in ("average", "stepwise", "lower")
    }
    distances = {block: distance(model, before) for block, model in found.items()}
    assert distances["average"] == min(distances.values())
    torch.manual_seed(0)
    moved = copy.deepcopy(found["average"])
    with torch.no_grad():
        for parameter in compression_of(moved).part_tensors():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    assert distance(moved, before) > distances["average"]
    ends = memfold.densify(found["stepwise"]).blocks, gpt().blocks
    own = compression_of(found["stepwise"]).map
    assert own[-1] == max(own)
    for place in (0, -1):
        name = "attention.qkv.weight"
        assert torch.equal(*(blocks[place].get_parameter(name) for blocks in ends))


def test_weights_to_start_from_are_averaged_or_refused():
    context = Context(start=lambda model: None)
    with pytest.raises(memfold.InputError, match="init_from gives weights, and tied keeps those"):
        Tied(ratio=0.4).compress(gpt(), context)
    Tied(ratio=0.4, initial_values="least_squares").compress(gpt(), context)


def test_a_frozen_norm_is_not_shared_with_trained_ones():
    torch.manual_seed(0)
    model = GPT(11, 8, width=8, depth=6, num_heads=2)
    model.blocks[1].norm1.requires_grad_(False)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=r"^norm1.weight is frozen in some repeated layers"):
        memfold.compress(model, "tied", ratio=1 / 3, norms="shared")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    memfold.compress(model, "tied", ratio=1 / 3, norms="own")
