"""What a model's own code, or a tool, does to its layers: right, or refused in one line."""

import copy
import io
import re

import pytest
import torch
from torch import nn

import memfold
from memfold.errors import InputError

# Values of its own for each weight, and values of the whole model.
STRATEGIES = ["stable_rps", "mag", "low_rank"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def compressed(model, strategy="stable_rps", ratio=0.5):
    return memfold.compress(model, strategy, ratio=ratio)


def refusal(message):
    return pytest.raises(InputError, match=re.escape(message))


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class RoutesInFloat32(nn.Module):
    """A mixture's router: it converts one layer in the forward pass, whatever the model's dtype."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.router = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.body(x)
        self.router = self.router.to(torch.float32)
        return self.router(hidden.float()).softmax(-1).to(hidden.dtype)


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [*((strategy, torch.float64) for strategy in STRATEGIES), ("stable_rps", torch.bfloat16)],
)
def test_a_layer_that_the_model_converts_is_converted(strategy, dtype, x):
    torch.manual_seed(0)
    model = compressed(RoutesInFloat32().to(dtype), strategy)
    dense = memfold.densify(model)
    for net in (model, copy.deepcopy(model)):
        torch.testing.assert_close(net(x.to(dtype)), dense(x.to(dtype)))
        assert net.router.weight.dtype == torch.float32
    model(x.to(dtype)).square().sum().backward()
    dense(x.to(dtype)).square().sum().backward()
    torch.testing.assert_close(model.body.bias.grad, dense.body.bias.grad)
    assert model.half().router.weight.dtype == torch.float16


def test_a_converted_layer_follows_the_whole_model_again(x):
    model = compressed(mlp())
    model[0].double()
    assert [model[i].weight.dtype for i in (0, 2)] == [torch.float64, torch.float32]
    holder = nn.Sequential(model).bfloat16()
    state = {name: value.float() for name, value in model.state_dict().items()}
    state["shared_fingerprint"] = model.state_dict()["shared_fingerprint"]
    holder[0].load_state_dict(state, assign=True)
    assert [model[i].weight.dtype for i in (0, 2)] == [torch.float32, torch.float32]
    assert "_apply" not in vars(memfold.densify(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_makes_a_program_is_refused_and_names_densify(x):
    model = compressed(mlp()).eval()
    for use in (
        lambda: torch.jit.trace(model, x),
        lambda: torch.jit.trace(model[0], x),
        lambda: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
        lambda: torch.export.export(model, (x,)),
    ):
        with refusal("can be neither traced nor exported: give memfold.densify(model)"):
            use()
    dense = memfold.densify(model)
    assert torch.equal(torch.jit.trace(dense, x)(x), dense(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scripted_is_refused_and_names_densify(strategy, x):
    model = compressed(mlp(), strategy)
    with refusal("script memfold.densify(model)"):
        torch.jit.script(model)
    dense = memfold.densify(model)
    assert torch.equal(torch.jit.script(dense)(x), dense(x))


class AddsAPrefix(nn.Module):
    """A wrapper that takes state dicts of what is inside."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def load_state_dict(self, state_dict, *args, **kwargs):
        renamed = {n if "inner." in n else f"inner.{n}": v for n, v in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_that_come_under_another_name_are_not_passed_over(strategy):
    model = compressed(AddsAPrefix(), strategy)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(1)
    with refusal("renames it; then call torch.nn.Module.load_state_dict(model, state)"):
        model.load_state_dict(other.state_dict(), strict=False)
    nn.Module.load_state_dict(model, other.state_dict())
    assert torch.equal(model.inner[0].weight, other.inner[0].weight)


class Renamed(nn.Module):
    """A wrapper whose place shows in the names of modules, not in those of the state dict."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_state_dict_post_hook(self._drop)

    @staticmethod
    def _drop(module, state, prefix, metadata):
        for name in list(state):
            state[name.replace("inner.", "")] = state.pop(name)


@pytest.mark.parametrize("strategy", ["dense", *STRATEGIES])
def test_names_that_no_state_dict_has_are_refused(strategy):
    model = nn.Sequential(Renamed())
    with refusal("0.inner.0.weight is not in the model's state dict"):
        memfold.compress(model, strategy)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
