"""Tensors that are no random weights: found by their initial values, and left untouched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.compression.initial_values import is_structured
from memfold.errors import InputError

STEPS = torch.arange(64.0)
ANGLES = STEPS[:, None] * torch.exp(-STEPS[None, :32] / 4)

STRUCTURED = {
    "zeros": torch.zeros(2, 3),
    "a constant": torch.full((1, 4, 1, 1), 1e-6),
    "one element": torch.tensor([[0.3]]),
    "an identity": torch.eye(3),
    "identities under each other": torch.eye(8).repeat(4, 1),
    "a Dirac kernel": nn.init.dirac_(torch.empty(4, 4, 3, 3)),
    "logarithms of decay rates": torch.arange(1.0, 5.0).log().repeat(8, 1),
    "a ramp": (torch.arange(16.0) / 16).view(1, 1, 16),
    "a centred ramp": torch.linspace(-1, 1, 10)[None],
    "numbers of one sign": -torch.rand(8, 8, generator=torch.Generator().manual_seed(0)),
    "sines and cosines": torch.cat([ANGLES.sin(), ANGLES.cos()], dim=1),
    "sines and cosines in turn": torch.stack([ANGLES.sin(), ANGLES.cos()], dim=-1).flatten(1),
    "copies of one row": torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(
        9, 1
    ),
    "much of it": torch.rand(600, 700, generator=torch.Generator().manual_seed(0)),
}
NOISE = {
    "uniform": lambda t: t.uniform_(-1, 1),
    "normal": lambda t: t.normal_(),
    "truncated": lambda t: nn.init.trunc_normal_(t, std=0.02),
    "a lopsided tail": lambda t: t.normal_().clamp_(min=-0.7),
    "kaiming": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "signs": lambda t: t.normal_().sign_(),
    "rows of zeros": lambda t: t.normal_()[0].zero_(),
    "sparse": lambda t: nn.init.sparse_(t.flatten(1), 0.9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_found(name, dtype):
    tensor = STRUCTURED[name].to(dtype)
    kept = tensor.clone()
    assert is_structured(tensor)
    assert is_structured(tensor.transpose(0, 1))
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("shape", [(2, 3), (1, 40), (64, 8), (6, 5, 3, 3), (400, 400)])
@pytest.mark.parametrize("name", NOISE)
def test_noise_of_every_usual_kind_is_none(name, shape):
    if (name == "rows of zeros" and shape[0] == 1) or (name == "sparse" and shape[0] < 50):
        pytest.skip("all zeros")
    tensor = torch.empty(shape, dtype=torch.float64)
    torch.manual_seed(1)
    NOISE[name](tensor)
    kept = tensor.clone()
    assert not is_structured(tensor)
    assert torch.equal(tensor, kept)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_small_noise_is_not_taken_for_structure(seed, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert is_structured(tensor) == (tensor.numel() == 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_to_the_strategy(value):
    assert not is_structured(torch.full((3, 3), value))
    assert not is_structured(torch.tensor([[1.0, value]]))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.decay = nn.Parameter(torch.arange(1.0, 9.0).log().repeat(6, 1))
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.token.zero_()
            self.decay.copy_(torch.arange(1.0, 9.0).log())

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x + self.token[0, 0]) * self.decay.exp().mean(0)))


@pytest.mark.parametrize(
    "strategy", ["stable_rps", "roast", "hashednet", "rand", "mag", "low_rank"]
)
def test_structured_tensors_are_left_untouched_and_named(strategy):
    torch.manual_seed(0)
    dense = Mixer()
    kept = {name: getattr(dense, name).detach().clone() for name in ("token", "decay")}
    options = {"tile_rows": 2, "tile_columns": 2} if strategy == "roast" else {}
    model = memfold.compress(dense, strategy, ratio=0.5, **options)
    compression = compression_of(model)
    assert compression.structured == ("token", "decay")
    assert compression.names == ["inner.weight", "head.weight"]
    counts = memfold.footprint(model)
    assert counts.num_weights == 6 * 8 + 8 * 4
    assert counts.untouched_bytes == 4 * (6 + 48 + 8 + 4)
    for name, values in kept.items():
        assert isinstance(getattr(model, name), nn.Parameter)
        assert torch.equal(getattr(model, name), values)


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"structured": "share"}, {"token", "decay", "inner.weight", "head.weight"}),
        ({"include": ["*", "dec*"]}, {"decay", "inner.weight", "head.weight"}),
        ({"include": ["token"]}, {"token"}),
        ({"exclude": ["inner"]}, {"head.weight"}),
    ],
)
def test_options_choose(options, shared):
    model = memfold.compress(Mixer(), "stable_rps", ratio=0.5, **options)
    assert set(compression_of(model).names) == shared


def test_a_layer_is_named_by_its_path_and_not_by_what_is_around_it():
    def zero_head():
        model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4)))
        nn.init.zeros_(model[1][0].weight)
        return model

    def names(*include):
        return compression_of(
            memfold.compress(zero_head(), "stable_rps", ratio=0.5, include=include)
        ).names

    assert names("*") == names("*", "1.*") == names("*", "1") == ["0.weight"]
    assert names("*", "1.0") == names("*", "*.0.weight") == ["0.weight", "1.0.weight"]


def test_nothing_left_is_said():
    message = "nothing is left to compress: the initial values of decay, token are constant or no"
    with pytest.raises(InputError, match=message):
        memfold.compress(Mixer(), "mag", ratio=0.5, exclude=["inner", "head"])
    with pytest.raises(InputError, match="structured must be keep or share, got 'drop'"):
        memfold.compress(Mixer(), "mag", ratio=0.5, structured="drop")


def test_dense_leaves_all_as_it_is_and_refuses_none():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    counts = memfold.footprint(memfold.compress(model, "dense"))
    assert (counts.num_weights, counts.stored_bytes) == (6, 4 * (6 + 2))


def test_a_model_on_the_meta_device_keeps_the_same_and_draws_the_same():
    torch.manual_seed(2)
    real = Mixer()
    with torch.device("meta"):
        empty = Mixer()
    torch.manual_seed(2)
    model = memfold.compress(empty, "stable_rps", ratio=1.0)
    assert compression_of(model).structured == ("token", "decay")
    dense = memfold.densify(model)
    for name, tensor in real.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], tensor, rtol=1e-6, atol=0)


def test_artifacts_do_not_ask_the_values_of_the_fresh_model(tmp_path):
    model = memfold.compress(Mixer(), "stable_rps", ratio=0.5)
    nn.init.normal_(model.token)
    memfold.save(model, tmp_path / "a.safetensors")
    fresh = Mixer()
    nn.init.zeros_(fresh.head.weight)
    loaded = memfold.load(tmp_path / "a.safetensors", fresh)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))


def test_the_magnitudes_of_weight_norm_are_norm_parameters():
    new = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    compression = compression_of(memfold.compress(new, "stable_rps", ratio=0.5))
    assert compression.names == ["parametrizations.weight.original1"]
