"""Activations that are computed again change nothing but memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.errors import InputError
from memfold.training.activation_checkpointing import checkpoint_activations
from strategies.cases import STRATEGIES, options_of


def gpt(depth: int = 2) -> nn.Module:
    return GPT(11, 6, width=8, depth=depth, num_heads=2, dropout=0.3)


def convolutional() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(block, nn.Flatten(), nn.Linear(36, 5))


NETWORKS = {"gpt": (gpt, "blocks.*"), "convolutional": (convolutional, "0")}


def inputs(backbone: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if backbone == "gpt":
        return torch.randint(11, (4, 6), generator=generator)
    return torch.randn(4, 2, 5, 5, generator=generator)


def build(name: str, backbone: str) -> nn.Module:
    torch.manual_seed(0)
    net = gpt(14) if STRATEGIES[name].needs_layers else NETWORKS[backbone][0]()
    samples = inputs(backbone)

    def loss(output: Tensor, _: Tensor) -> Tensor:
        return output.square().mean()

    if name != "small":  # it stays dense
        data = [(samples, samples)]
        memfold.compress(net, name, data=data, loss=loss, **options_of(name, ratio=0.5))
    return net


def step(net: nn.Module, samples: Tensor) -> None:
    torch.manual_seed(2)
    net.zero_grad()
    (net(samples).square().mean() + memfold.extra_loss(net)).backward()


@pytest.mark.parametrize("backbone", NETWORKS)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_gradients_and_buffers_are_the_same_to_the_bit(name: str, backbone: str) -> None:
    if STRATEGIES[name].needs_layers and backbone == "convolutional":
        pytest.skip("it has one block")
    plain, net, samples = build(name, backbone), build(name, backbone), inputs(backbone)
    checkpoint_activations(net, NETWORKS[backbone][1])
    calls = []
    inside = net.get_submodule("blocks.0.up" if backbone == "gpt" else "0.0")
    inside.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        for each in (plain, net):
            step(each, samples)
        pairs = zip(plain.parameters(), net.parameters(), strict=True)
        for one, other in pairs:
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
        found = net.state_dict()
        for key, tensor in plain.state_dict().items():
            assert torch.equal(found[key], tensor)
    assert len(calls) == 4
    plain.eval(), net.eval()
    assert torch.equal(net(samples), plain(samples))
    assert torch.equal(memfold.densify(net)(samples), memfold.densify(plain)(samples))
    assert torch.equal(copy.deepcopy(net)(samples), plain(samples))
    assert len(calls) == 5 + 1 + 1  # the copies have the hook


def test_of_nested_modules_the_outermost_is_taken() -> None:
    net = gpt()
    checkpoint_activations(net, "blocks*")  # not the list itself, which nobody calls
    chosen = [name for name, module in net.named_modules() if "forward" in vars(module)]
    assert chosen == ["blocks.0", "blocks.1"]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = r"trainer\.activation_checkpointing=layers\.\* matches no module; modules: embedding"
    with pytest.raises(InputError, match=message) as caught:
        checkpoint_activations(gpt(), "layers.*")
    assert "blocks.0, " in str(caught.value)


def test_buffers_in_a_compiled_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"with trainer\.compile=true: 0 has buffers"):
        checkpoint_activations(convolutional(), "0", compiles=True)
    checkpoint_activations(gpt(), "blocks.*", compiles=True)
