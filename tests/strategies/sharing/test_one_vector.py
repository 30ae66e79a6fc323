"""The shared values exist once, however a model is counted, copied, moved, saved or loaded."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_summary import ModelSummary
from safetensors.torch import load_file, save_file
from torch import nn

import memfold

NUM_VALUES = 100  # of 200 weights, and 20 biases


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    return memfold.compress(net, "stable_rps", ratio=0.5)


class Task(LightningModule):
    """Holds a network as a task does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_every_count_has_them_once(tmp_path: Path) -> None:
    net = make()
    trained = NUM_VALUES + 20
    assert sum(parameter.numel() for parameter in net.parameters()) == trained
    summary = ModelSummary(Task(net), max_depth=-1)
    assert summary.total_parameters == trained
    assert summary.param_nums[1:] == [10, 0, 10]  # the layers' rows: what they own
    state = net.state_dict()
    assert [name for name, value in state.items() if value.numel() == NUM_VALUES] == [
        "shared_values"
    ]
    pointers = [value.data_ptr() for value in state.values() if value.numel() > 0]
    assert len(set(pointers)) == len(pointers)
    save_file(state, tmp_path / "state.safetensors")  # refuses tensors that share memory
    loaded = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def via_meta(net: nn.Module) -> nn.Module:
    state = net.state_dict()
    empty = copy.deepcopy(net).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return empty


def assigned(net: nn.Module) -> nn.Module:
    other = make(seed=1)
    other.load_state_dict(net.state_dict(), assign=True)
    return other


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: net.to(torch.float64).to(torch.float32), via_meta, assigned],
    ids=["deepcopy", "to", "to_empty", "assign"],
)
def test_every_layer_of_a_copy_reads_them(copied: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(4, 10)
    expected = make()(x)
    net = copied(make())
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    values = dict(net.named_parameters())["shared_values"]
    layers = list(net.children())
    for layer in (layers[0], layers[2]):
        before = layer(x)
        with torch.no_grad():
            values.mul_(2)
        assert not torch.allclose(layer(x), before)
    net(x).sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (NUM_VALUES,)
