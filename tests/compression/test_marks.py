"""State dicts tell whose values they have: others, and averages of several, are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import memfold
from memfold.compression import compression_of
from memfold.compression.parts import MARKS

NAMES = ("rand", "mag", "snip", "grasp", "synflow", "set", "rigl", "ltr", "low_rank")
BATCHES = [(torch.randn(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 4)]


def network(name: str, *, weights: int = 0, **options: Any) -> nn.Module:
    """Compress one that was drawn from the seed `weights`."""
    torch.manual_seed(weights)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    if name in ("snip", "grasp", "synflow"):
        options |= {"data": BATCHES, "loss": cross_entropy}
    return memfold.compress(net, name, **{"ratio": 0.4, **options})


def copies(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "options", [{"ratio": 0.6}, {"seed": 3}, {"ratio": None, "budget_bytes": 900}]
)
@pytest.mark.parametrize("name", NAMES)
def test_values_of_another_seed_or_budget_are_refused(name: str, options: dict[str, Any]) -> None:
    net, other = network(name), network(name, **options)
    before = copies(net)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="belong to another seed, ratio") as raised:
            net.load_state_dict(other.state_dict(), strict=strict)
        # One line below PyTorch's own, whatever shapes differ; and nothing was loaded.
        assert len(str(raised.value).splitlines()) == 2
        assert same(net.state_dict(), before)


def test_values_of_another_strategy_are_refused() -> None:
    with pytest.raises(RuntimeError, match="belong to another seed, ratio or strategy"):
        network("set").load_state_dict(network("rigl").state_dict())
    for name in ("mag", "set"):
        with pytest.raises(RuntimeError, match=r"values came without .*: nothing tells where"):
            network(name).load_state_dict(values("mag"), strict=False)


def values(name: str) -> dict[str, Tensor]:
    """Return what there is without the positions."""
    return {key: tensor.detach() for key, tensor in network(name).named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_values_of_other_initial_weights_are_taken(name: str) -> None:
    source, net = network(name, weights=1), network(name)
    net.load_state_dict({f"{key}": tensor for key, tensor in source.state_dict().items()})
    assert same(source.state_dict(), net.state_dict())
    assert memfold.footprint(source) == memfold.footprint(net)


def test_the_default_ratio_is_the_same_when_it_is_given() -> None:
    network("mag", ratio=0.1).load_state_dict(network("mag", ratio=None).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_older_versions_have_no_marks(name: str) -> None:
    source, net = network(name, weights=1), network(name)
    state = copies(source)
    for key in (MARKS, "0.weight", "2.weight"):
        del state[key]
    net.load_state_dict(state)
    assert same(source.state_dict(), net.state_dict())


class Tied(nn.Module):
    """A model with a tied weight, as a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.ModuleDict({"table": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
        body["head"].weight = body["table"].weight
        body["between"] = nn.Linear(6, 6)
        self.body = body


@pytest.mark.parametrize("name", ["stable_rps", "roast", "hashednet", "mag", "rigl", "low_rank"])
def test_neither_kind_of_model_takes_the_weights_of_the_other(name: str) -> None:
    options = {"tile_rows": 2, "tile_columns": 2} if name == "roast" else {}
    dense, net = Tied(), Tied()
    memfold.compress(net.body, name, ratio=0.5, **options)
    weights = ["body.between.weight", "body.head.weight", "body.table.weight"]
    state = net.state_dict()
    assert [key for key, tensor in state.items() if tensor.numel() == 0] == weights
    before = copies(dense), copies(net)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for body\.table\.weight"):
            dense.load_state_dict(state, strict=strict)
        with pytest.raises(RuntimeError, match=r"of a dense model \(it has body\.between\.weight"):
            net.load_state_dict(before[0], strict=strict)
    assert same(dense.state_dict(), {**before[0], "body.between.bias": state["body.between.bias"]})
    assert same(net.state_dict(), before[1])
    net.load_state_dict(state)


def averaged(first: nn.Module, second: nn.Module, weight: float) -> dict[str, Tensor]:
    """Average what is floating-point, as federated learning does, and take the rest of one."""
    state, other = copies(first), second.state_dict()
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = tensor * (1 - weight) + other[key] * weight
    return state


@pytest.mark.parametrize("weight", [0.5, 0.3, 0.01, 0.99])
@pytest.mark.parametrize("name", ["mag", "snip", "set", "rigl"])
def test_averages_over_different_positions_are_refused(name: str, weight: float) -> None:
    # The same number of values in each layer, in other places.
    layers = {} if name in ("set", "rigl") else {"scope": "layer"}
    first, second = network(name, **layers), network(name, weights=1, **layers)
    if name in ("set", "rigl"):
        compression = compression_of(second)
        compression.set_masks([mask.flip(0, 1) for mask in compression.masks()])
    for start in (first, network(name, **layers)):
        before = copies(start)
        with pytest.raises(RuntimeError, match=r"average dense weights, .* memfold.densify"):
            start.load_state_dict(averaged(first, second, weight))
        assert same(start.state_dict(), before)


@pytest.mark.parametrize("name", ["mag", "set", "low_rank"])
def test_averages_over_the_same_positions_are_averages(name: str) -> None:
    first, second, net = (network(name) for _ in range(3))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(3)
    net.load_state_dict(averaged(first, second, 0.3))
    for key, tensor in net.named_parameters():
        expected = 0.7 * first.get_parameter(key) + 0.3 * second.get_parameter(key)
        torch.testing.assert_close(tensor, expected)
