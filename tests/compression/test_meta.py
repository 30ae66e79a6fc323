"""Models without values: initialised as their constructor would, one module at a time."""

import re

import pytest
import torch
from torch import nn

import memfold
from memfold.compression.materialise import device_of
from memfold.errors import InputError
from strategies.cases import INITIALISING, STRATEGIES, options_of
from strategies.meta import LeavesItsScale, folded, mlp, on_meta, refusal, tensors_of
from strategies.models import MODELS, TiedLanguageModel

# Their constructors give weights values that no initialiser would: copies, an edit, plain draws.
BUILT_OTHERWISE = {"transformer", "zero_head", "functional", "weight_norm"}
PLAIN = sorted(MODELS.keys() - BUILT_OTHERWISE)


def dense(build):
    torch.manual_seed(5)
    return build()


@pytest.mark.parametrize("name", PLAIN)
def test_at_ratio_1_the_weights_are_those_of_the_dense_construction(name):
    build = MODELS[name][0]
    expected = dense(build).state_dict()
    found = memfold.densify(folded(on_meta(build), ratio=1)).state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("strategy", INITIALISING)
def test_below_it_nothing_tells_the_two_constructions_apart(strategy, name):
    build = MODELS[name][0]
    options = options_of(strategy)
    expected = memfold.compress(dense(build), strategy, **options)
    found = folded(on_meta(build), strategy, **options)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert not any(buffer.is_meta for buffer in found.buffers())


class Watched(nn.Linear):
    """Sees how many weights have memory while it is initialised."""

    model: nn.Module
    seen: list[int]

    def reset_parameters(self):
        super().reset_parameters()
        if not self.weight.is_meta:
            weights = [layer.weight for layer in self.model if isinstance(layer, nn.Linear)]
            self.seen.append(sum(not weight.is_meta for weight in weights))


@pytest.mark.parametrize("ratio", [0.1, 1])
def test_one_weight_has_memory_at_a_time(ratio):
    model = on_meta(lambda: nn.Sequential(*[Watched(8, 8) for _ in range(4)]))
    Watched.model, Watched.seen = model, []
    folded(model, ratio=ratio)
    assert Watched.seen == [1] * 8  # once to look whether they are noise, once to fold them


class Fails(nn.Linear):
    def reset_parameters(self):
        if not self.weight.is_meta:
            raise OSError("no values today")


class NotFinite(nn.Linear):
    def reset_parameters(self):
        nn.init.constant_(self.weight, float("nan"))
        nn.init.zeros_(self.bias)


class Replaces(nn.Linear):
    def reset_parameters(self):
        self.weight = nn.Parameter(torch.randn(self.weight.shape))
        nn.init.zeros_(self.bias)


class NoInitialiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))


class HoldsATensor(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.angles = [torch.arange(3)]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Fails(8, 8), OSError, "no values today"),
        (
            lambda: NotFinite(8, 8),
            InputError,
            "3.weight: on the meta device, and NotFinite.reset_parameters does",
        ),
        (
            lambda: LeavesItsScale(8, 8),
            InputError,
            "3.table: on the meta device, and LeavesItsScale.reset_parameters does not fill",
        ),
        (lambda: Replaces(8, 8), InputError, "3.weight: on the meta device, and Replaces.reset"),
        (NoInitialiser, InputError, "3.matrix: on the meta device, and nothing initialises"),
        (lambda: HoldsATensor(8, 8), InputError, "3.angles holds a tensor on the meta device"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            InputError,
            "3.parametrizations.weight.original0, 3.parametrizations.weight.original1: on the meta",
        ),
    ],
)
def test_where_a_module_cannot_be_initialised_the_model_stays_as_it_was(build, error, message):
    model = on_meta(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LSTM(8, 8), build())
    )
    before = tensors_of(model)
    lists = list(model[2]._flat_weights)
    with pytest.raises(error, match=re.escape(message)) as caught:
        folded(model, ratio=0.5)
    assert error is not InputError or "\n" not in str(caught.value)
    assert tensors_of(model) == before
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert all(old is new for old, new in zip(lists, model[2]._flat_weights, strict=True))


def test_what_is_checked_first_costs_no_initialisation():
    model = on_meta(lambda: nn.Sequential(Fails(8, 8), nn.Linear(8, 8)))
    with refusal("leave nothing to compress"):
        folded(model, min_size=1000)


def test_tensors_with_values_keep_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2))
    model[1].running_mean.fill_(3)
    model[2].out_proj.bias.data.fill_(2)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = [(model[0], "bias"), (model[1], "weight"), (model[2], "in_proj_weight")]
    for module, name in empty:
        setattr(module, name, nn.Parameter(getattr(module, name).to("meta")))
    found = memfold.densify(folded(model, ratio=1)).state_dict()
    filled = {"0.bias", "1.weight", "2.in_proj_weight"}
    for name in kept.keys() - filled:
        torch.testing.assert_close(found[name], kept[name], rtol=1e-6, atol=0)
    assert torch.equal(found["1.weight"], torch.ones(8))
    for name in ("0.bias", "2.in_proj_weight"):
        assert not torch.equal(found[name], kept[name])
        assert found[name].std() > 0.1


def test_the_device_is_that_of_the_other_tensors_or_the_default():
    model = on_meta(mlp)
    assert device_of(model) == torch.device("cpu")
    with torch.device("meta"):
        assert device_of(model) == torch.device("cpu")
        folded(model, ratio=0.5)
    assert model.shared_values.device == torch.device("cpu")
    assert model[0].bias.device == torch.device("cpu")
    model(torch.randn(2, 6))


class HuggingFaceLike(nn.Module):
    """Initialises everything from the root, also a module that knows nothing of it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = NoInitialiser()
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.02)
        if isinstance(module, NoInitialiser):
            nn.init.constant_(module.matrix, 0.25)


def test_the_initialiser_of_the_root_is_called_for_every_module():
    model = memfold.densify(folded(on_meta(HuggingFaceLike), ratio=1))
    torch.testing.assert_close(model.inner.matrix, torch.full((4, 4), 0.25))
    assert 0.01 < model.embedding.weight.std() < 0.03


class OwnsAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.empty(4, 4)) for _ in range(2)])
        self.reset_parameters()

    def reset_parameters(self):
        for part in self.parts:
            nn.init.normal_(part)


def test_a_module_without_an_initialiser_is_filled_by_the_one_around_it():
    expected = dense(lambda: nn.Sequential(OwnsAList())).state_dict()
    model = folded(on_meta(lambda: nn.Sequential(OwnsAList())), ratio=1)
    found = memfold.densify(model).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)


class Scaled(nn.Module):
    """Its initialiser calls that of the layer inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def reset_parameters(self):
        nn.init.zeros_(self.layer.weight)
        nn.init.constant_(self.layer.bias, 0.5)
        nn.init.ones_(self.scale)


def test_what_an_initialiser_does_to_weights_of_other_modules_is_said():
    model = on_meta(Scaled)
    message = "Scaled.reset_parameters also writes to layer.weight of other modules"
    with pytest.warns(UserWarning, match=message):
        folded(model, ratio=1)
    assert model.layer.weight.std() > 0.1
    assert torch.equal(model.layer.bias, torch.full((8,), 0.5))
    build = lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True)  # noqa: E731
    with pytest.warns(UserWarning, match=r"Transformer\._reset_parameters: not called"):
        folded(on_meta(build), ratio=0.5)


def test_a_tied_tensor_gets_the_values_of_its_first_owner():
    model = folded(on_meta(TiedLanguageModel), ratio=1)
    assert 0.7 < model.head.weight.std() < 1.3
    assert torch.equal(model.head.weight, model.embedding.weight)
    untouched = folded(on_meta(TiedLanguageModel), ratio=1, exclude=["embedding"])
    assert untouched.head.weight is untouched.embedding.weight
    assert torch.equal(untouched.head.weight, dense(TiedLanguageModel).head.weight)


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - set(INITIALISING)))
def test_the_other_strategies_say_who_can(name):
    model = on_meta(mlp)
    before = tensors_of(model)
    with refusal(
        "0.weight is on the meta device and has no values: only strategies that draw weights anew"
    ):
        memfold.compress(model, name, **STRATEGIES[name].options)
    assert tensors_of(model) == before


def test_the_footprint_is_known_before_there_are_values():
    counted = memfold.footprint(on_meta(mlp))
    assert counted == memfold.footprint(mlp())


class WithArgument(nn.Linear):
    def reset_parameters(self, std=None, *, really):
        raise AssertionError("nobody knows the argument")


class ScalesWhatWasThere(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def reset_parameters(self):
        with torch.no_grad():
            self.matrix.mul_(0.1)


class FillsInPart(ScalesWhatWasThere):
    def reset_parameters(self):
        with torch.no_grad():
            self.matrix[:2].fill_(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), None),
        (ScalesWhatWasThere, "does not fill it"),
        (FillsInPart, "does not fill it"),
    ],
)
def test_an_initialiser_that_leaves_holes_is_refused(make, message):
    with torch.device("meta"):
        model = nn.Sequential(make())
    if message is None:
        memfold.compress(model, "stable_rps", ratio=0.5)
        return
    with pytest.raises(InputError, match=message):
        memfold.compress(model, "stable_rps", ratio=0.5)
    assert all(p.is_meta for p in model.parameters())


def test_an_initialiser_that_needs_arguments_is_none():
    layer = nn.Linear(4, 4, device="meta")
    layer.__class__ = WithArgument
    with pytest.raises(InputError, match="nothing initialises them"):
        memfold.compress(nn.Sequential(layer), "stable_rps", ratio=0.5)
