"""Models and uses that are easy to get wrong in silence: each is right, or refused in one line."""

import copy
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.compression import compression_of
from memfold.errors import InputError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def folded(model, ratio=0.2, **options):
    return memfold.compress(model, "stable_rps", ratio=ratio, **options)


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def refusal(message):
    return pytest.raises(InputError, match=re.escape(message))


def test_frozen_weights_survive_the_artifact(x, tmp_path):
    model = mlp()
    model[0].weight.requires_grad_(False)
    folded(model)
    memfold.save(model, tmp_path / "a.safetensors")
    for fresh in (mlp(), mlp().requires_grad_(False)):
        loaded = memfold.load(tmp_path / "a.safetensors", fresh)
        assert torch.equal(loaded(x), model(x))


def test_a_replaced_layer_is_not_lost(tmp_path):
    model = folded(mlp())
    model[2] = nn.Linear(16, 8)
    with refusal("2.weight: its module was replaced"):
        memfold.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(x, tmp_path):
    model = folded(mlp(), seed=5, initial_scale=1)
    other = folded(mlp(), ratio=np.float64(0.2), seed=np.int64(5), initial_scale=np.float32(1))
    assert torch.equal(model(x), other(x))
    assert compression_of(other).strategy.to_dict() == compression_of(model).strategy.to_dict()
    memfold.save(other, tmp_path / "a.safetensors")
    other.load_state_dict(model.state_dict())


def test_a_pass_that_is_not_the_roots_reads_the_values_of_now(x):
    model = folded(mlp())
    first = model.forward(x)
    model.shared_values.data.mul_(2)
    second = model.forward(x)
    assert not torch.equal(first, second)
    assert torch.equal(second, model(x))
    held = model[0].weight
    model.shared_values = nn.Parameter(model.shared_values.detach() * 3)
    assert torch.allclose(model[0].weight, 3 * held)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_refused_not_wrong(x):
    model = folded(mlp())
    values = model.shared_values.detach()

    def output(values):
        return torch.func.functional_call(model, {"shared_values": values}, (x,)).sum()

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(output, (values,), (torch.ones_like(values),))


def test_reverse_mode_transforms_equal_backward(x):
    model = folded(mlp())

    def output(values):
        return torch.func.functional_call(model, {"shared_values": values}, (x,)).sum()

    found = torch.func.grad(output)(model.shared_values.detach())
    output(model.shared_values).backward()
    torch.testing.assert_close(found, model.shared_values.grad)


def test_weights_tied_by_memory_are_one_weight():
    table = torch.randn(50, 8)
    model = nn.Sequential(*[nn.Linear(8, 50, bias=False) for _ in range(4)])
    for layer in model:
        layer.weight = nn.Parameter(table)
    folded(model, ratio=None, budget_bytes=1000)
    counted = memfold.footprint(model)
    assert counted.num_weights == 400
    assert counted.num_values < 150
    assert torch.equal(model[0].weight, model[3].weight)


def overlapping():
    table = torch.randn(20, 8)
    model = nn.Sequential(nn.Linear(8, 10, bias=False), nn.Linear(8, 12, bias=False))
    model[0].weight = nn.Parameter(table[:10])
    model[1].weight = nn.Parameter(table[8:])
    return model


class HoldsAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.weights = [self.layer.weight]


class HoldsABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("copy", self.layer.weight.detach())


class HasTheName(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer(name, torch.zeros(3))


class OnlyOne(nn.Linear):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no heirs")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (overlapping(), "0.weight and 1.weight overlap in memory"),
        (HoldsAList(), "weights holds the memory of layer.weight"),
        (HoldsABuffer(), "copy holds the memory of layer.weight"),
        (HasTheName("shared_values"), "an attribute shared_values"),
        (HasTheName("shared_scales"), "an attribute shared_scales"),
        (OnlyOne(8, 8), "no class can be derived from OnlyOne (no heirs)"),
    ],
)
def test_refused_and_unchanged(model, message):
    names = list(model.state_dict())
    with refusal(message):
        folded(model, ratio=0.5)
    assert list(model.state_dict()) == names
    assert [n for n, _ in model.named_parameters()]


def test_parts_and_wrappers_of_a_compressed_model(tmp_path, x):
    model = folded(nn.Sequential(mlp(), mlp()))
    for use in (memfold.footprint, memfold.densify, folded):
        with refusal("is a part of a compressed model"):
            use(model[0])
    with refusal("is a part of a compressed model"):
        memfold.save(model[0], tmp_path / "a.safetensors")
    wrapper = torch.optim.swa_utils.AveragedModel(model)
    with refusal("the compressed model is the part 'module'"):
        memfold.save(wrapper, tmp_path / "a.safetensors")
    assert torch.equal(wrapper(x), model(x))
    with refusal("the model is compressed already"):
        memfold.save(model, tmp_path / "a.safetensors")
        memfold.load(tmp_path / "a.safetensors", model)


def test_a_module_is_compressed_from_one_root_only():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4))
    folded(model, ratio=0.5, exclude=["*weight_hh*"])
    with refusal("is a part of a compressed model"):
        folded(model[0], ratio=0.5)


def test_patterns_may_be_any_iterable_and_name_whole_branches():
    model = folded(mlp(), exclude=(pattern for pattern in ["2"]))
    assert compression_of(model).names == ["0.weight"]
    model = folded(nn.Sequential(mlp(), mlp()), exclude=["0"])
    assert compression_of(model).names == ["1.0.weight", "1.2.weight"]
    with refusal("compression.include must be a list (text each), got 5"):
        folded(mlp(), include=5)


class FunctionalHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.hidden = nn.Linear(8, 8)

    def forward(self, tokens):
        return F.linear(self.hidden(self.embedding(tokens)), self.embedding.weight)


def test_ratio_one_is_dense_training_with_a_padding_row_that_the_head_uses():
    torch.manual_seed(0)
    dense = FunctionalHead().double()
    model = folded(copy.deepcopy(dense), ratio=1.0)
    tokens = torch.tensor([[0, 3, 5, 19], [2, 0, 1, 1]])
    for net in (dense, model):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    torch.testing.assert_close(model(tokens), dense(tokens))


def test_norms_and_biases_of_any_dimension_stay_untouched():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm([4, 8]))
    folded(model)
    assert compression_of(model).names == ["0.weight"]
    assert bool((model[1].weight == 1).all())
    attention = folded(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert compression_of(attention).names == ["in_proj_weight", "out_proj.weight"]


def test_loading_and_running_in_inference_mode(x, tmp_path):
    model = folded(mlp())
    memfold.save(model, tmp_path / "a.safetensors")
    with torch.inference_mode():
        assert torch.equal(memfold.load(tmp_path / "a.safetensors", mlp())(x), model(x))


class HasALock(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_modules_own_way_to_be_copied_is_used(x):
    model = folded(nn.Sequential(HasALock(8, 8)))
    assert torch.equal(memfold.densify(model)(x), model(x))
    assert copy.deepcopy(model)[0].lock is not model[0].lock


def test_buffers_that_share_memory_are_stored(tmp_path):
    model = mlp()
    model.register_buffer("whole", torch.arange(16.0))
    model.register_buffer("part", model.whole[:8])
    folded(model)
    memfold.save(model, tmp_path / "a.safetensors")
    other = mlp()
    other.register_buffer("whole", torch.zeros(16))
    other.register_buffer("part", torch.zeros(8))
    memfold.load(tmp_path / "a.safetensors", other)
    assert torch.equal(other.part, torch.arange(8.0))


def test_values_without_their_mapping_are_refused_even_when_not_strict(x):
    model, other = folded(mlp(), seed=1), folded(mlp(), seed=2)
    with pytest.raises(RuntimeError, match="another strategy, seed"):
        model.load_state_dict(other.state_dict(), strict=False)
    state = other.state_dict()
    del state["shared_fingerprint"]
    with pytest.raises(RuntimeError, match="nothing tells where"):
        model.load_state_dict(state, strict=False)
    model.load_state_dict({"0.bias": torch.zeros(16)}, strict=False)


def test_densify_keeps_frozen_values_frozen():
    model = folded(mlp())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in memfold.densify(model).parameters())


@pytest.mark.parametrize("arguments", [({}, "stable_rps"), (mlp(), 5)])
def test_what_is_no_model_or_strategy(arguments):
    with refusal(" must be a "):
        memfold.compress(*arguments)
    with refusal("strategy must be"):
        memfold.compress(mlp(), "stable_rps", name="dense")


def test_save_needs_a_folder(tmp_path):
    for path in (tmp_path / "missing" / "a.safetensors", tmp_path):
        with refusal("must be a file in a folder that exists"):
            memfold.save(folded(mlp()), path)


@pytest.mark.parametrize("gradient_scale", ["length", "projection", "none"])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_layers_of_any_scale_stay_finite(ratio, gradient_scale, x):
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(1e-30)
        model[2].weight.mul_(1e8)
    dense = copy.deepcopy(model)
    folded(model, ratio=ratio, gradient_scale=gradient_scale)
    model(x).sum().backward()
    assert model(x).isfinite().all()
    assert model.shared_values.isfinite().all()
    assert model.shared_values.grad.isfinite().all()
    if ratio == 1:
        torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("strategy", ["set", "low_rank"])
def test_an_optimizer_of_the_dense_parameters_is_refused(strategy):
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memfold.compress(model, strategy, ratio=0.5)
    with pytest.raises(InputError, match=r"make it after memfold\.compress"):
        memfold.before_step(model, optimizer, step=0, total_steps=500)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("supermask", "kept_counts"), ("low_rank", "factor_values"), ("mag", "kept_values")],
)
def test_names_that_the_compression_needs_are_refused(strategy, name):
    model = nn.Sequential(nn.Linear(20, 20))
    model.register_buffer(name, torch.zeros(3))
    with pytest.raises(InputError, match=f"the model has an attribute {name}"):
        memfold.compress(model, strategy, ratio=0.5)
    assert type(model[0]) is nn.Linear


class Pretrained(nn.Module):
    """A part with the methods of a transformers model."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def save_pretrained(self, folder):
        return f"saved in {folder}"

    def tie_weights(self):
        return "tied"


@pytest.mark.parametrize("method", ["save_pretrained", "tie_weights"])
def test_what_writes_dense_weights_is_refused_until_densified(method):
    arguments = ("folder",) if method == "save_pretrained" else ()
    dense = nn.Sequential(Pretrained())
    expected = getattr(dense[0], method)(*arguments)
    model = copy.deepcopy(memfold.compress(dense, "stable_rps", ratio=0.5))
    with pytest.raises(InputError, match=rf"{method} needs dense weights.*memfold\.densify"):
        getattr(model[0], method)(*arguments)
    assert getattr(memfold.densify(model)[0], method)(*arguments) == expected
    dense = memfold.compress(nn.Sequential(Pretrained()), "dense")  # its weights are dense ones
    assert getattr(dense[0], method)(*arguments) == expected
