"""Tied layers with differences: tied at rank 0, the plain model at full rank, and fits between."""

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of

DEPTH = 6
SHAPE = (10, 12)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 10) for _ in range(DEPTH))

    def forward(self, x):
        return torch.stack([layer(x).tanh() for layer in self.layers]).sum(0)


def network():
    torch.manual_seed(0)
    return Stacked().double()


def lora(rank, **options):
    loops = options.get("loops", 2)
    differences = DEPTH // 2 if loops == 2 and options.get("block") is None else DEPTH
    ratio = (120 * DEPTH // loops + differences * rank * 22) / (DEPTH * 120)
    return memfold.compress(network(), "recursive_lora", ratio=min(1, ratio), **options)


def weights_of(model):
    return torch.stack([layer.weight.detach() for layer in memfold.densify(model).layers])


def test_rank_nothing_is_tied_which_a_warning_says():
    with pytest.warns(UserWarning, match=r"ratio=0.5 leaves nothing for differences, layers are t"):
        model = lora(0)
    tied = memfold.compress(network(), "tied", ratio=0.5)
    assert compression_of(model).rank == 0
    assert torch.equal(weights_of(model), weights_of(tied))
    assert model.state_dict().keys() == tied.state_dict().keys()


@pytest.mark.parametrize("block", [None, "stepwise", "lower"])
def test_a_fit_leaves_the_dropped_singular_values(block):
    before = weights_of(network())
    errors = []
    for rank in (1, 2):
        options = {} if block is None else {"block": block}
        model = lora(rank, **options, initial_values="least_squares")
        compression = compression_of(model)
        assert compression.rank == rank
        dropped, found = 0.0, weights_of(model)
        for index in range(DEPTH):
            shared = compression.part(index, "tied").detach()
            values = torch.linalg.svdvals(before[index] - shared)
            dropped += values[rank:].square().sum()
        errors.append((found - before).square().sum())
        torch.testing.assert_close(errors[-1], dropped, rtol=1e-9, atol=1e-12)
    assert errors[1] < errors[0]


def test_full_rank_gives_the_layers_back():
    options = {"loops": 6, "initial_values": "least_squares", "map": [0, 0, 0, 0, 0, 0]}
    budget = 1 << 20
    model = memfold.compress(network(), "recursive_lora", budget_bytes=budget, **options)
    assert compression_of(model).rank == 10
    torch.testing.assert_close(weights_of(model), weights_of(network()), rtol=1e-10, atol=1e-12)


def test_by_default_there_are_differences():
    assert compression_of(memfold.compress(network(), "recursive_lora")).rank > 0


def test_block_means_nothing_where_values_are_random():
    states = [lora(2, block=block).state_dict() for block in ("average", "stepwise", "lower")]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        values = {key for key in state if key != "compression_marks"}
        assert all(torch.equal(state[key], states[0][key]) for key in values)


def test_two_around_their_mean_have_one_difference():
    model = lora(2, initial_values="least_squares")
    compression, found = compression_of(model), weights_of(model)
    assert compression.num_values == 3 * 120 + 3 * 2 * 22
    for first, second in ((0, 3), (1, 4), (2, 5)):
        shared = compression.part(first, "tied").detach()
        assert compression.part(second, "up") is compression.part(first, "up")
        torch.testing.assert_close(found[first] + found[second], 2 * shared, rtol=0, atol=1e-15)
    options = {"initial_values": "least_squares", "budget_bytes": 1 << 20}
    full = memfold.compress(network(), "recursive_lora", **options)
    assert compression_of(full).rank == 10
    torch.testing.assert_close(weights_of(full), weights_of(network()), rtol=1e-10, atol=1e-12)


def test_fresh_models_start_as_tied_ones_and_learn_to_differ():
    model = lora(2, block="lower")
    found = weights_of(model)
    assert torch.equal(found[0], found[3])
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = torch.stack([layer(x) for layer in model.layers])
        (outputs * torch.linspace(-1, 1, DEPTH)[:, None, None]).square().mean().backward()
        optimizer.step()
    found = weights_of(model)
    assert not torch.equal(found[0], found[3])


def test_gradients_are_those_of_the_factors():
    model = lora(2, block="lower", initial_values="least_squares")
    dense = memfold.densify(model)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one in (model, dense):
        one(x).square().sum().backward()
    compression, close = compression_of(model), {"rtol": 1e-10, "atol": 1e-12}
    for index in range(DEPTH):
        up, down = compression.part(index, "up"), compression.part(index, "down")
        gradient = dense.layers[index].weight.grad
        torch.testing.assert_close(up.grad, gradient @ down.detach().T, **close)
        torch.testing.assert_close(down.grad, up.detach().T @ gradient, **close)


def test_an_artifact_comes_back(tmp_path):
    model = lora(2, initial_values="least_squares")
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", network())
    assert torch.equal(weights_of(loaded), weights_of(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": 4}, r"loops=4: 6 layers in compression.map=cycle can share in loops of 1, 2, 3"),
        ({"map": "middle_cycle", "loops": 3}, r"can share in loops of 1, 2, 4"),
    ],
)
def test_depths_that_loops_do_not_divide_are_refused(options, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(network(), "recursive_lora", **options)
