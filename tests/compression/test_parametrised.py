"""Weights that others are computed from: right, or refused with the way out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import memfold
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.strategies import strategy_class
from strategies.cases import ANY_MODULE, options_of


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def _old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(layer)


def _prune_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)


# name -> (what is done to a layer, what ends it)
KINDS = {
    "weight_norm": (parametrizations.weight_norm, "parametrize.remove_parametrizations"),
    "symmetric": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        "parametrize.remove_parametrizations",
    ),
    "spectral_norm": (parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    "old_weight_norm": (_old_weight_norm, "remove_weight_norm"),
    "old_spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "pruned_twice": (_prune_twice, "prune.remove"),
}
STATELESS = ("weight_norm", "symmetric")


def build(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    KINDS[kind][0](model[0])
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 3


def compress(model, strategy, **options):
    options = {**options_of(strategy), **options}
    return memfold.compress(model, strategy, data=[batch()], loss=F.cross_entropy, **options)


def train(model):
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        memfold.before_step(model, optimizer, step=step, total_steps=20)
        optimizer.step()


def check_rebuilds(model, kind, path):
    """Densified and loaded, a trained model is the same function."""
    x, _ = batch()
    expected = model.eval()(x)
    assert expected.isfinite().all()
    dense = memfold.densify(model)
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-6)
    assert list(dense.state_dict()) == list(build(kind).state_dict())
    memfold.save(model, path)
    loaded = memfold.load(path, build(kind)).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_right_or_refused(strategy, kind, tmp_path):
    model = build(kind)
    if strategy == "dense" and kind == "old_spectral_norm":
        with pytest.raises(InputError, match=r"0\.weight holds the memory of 0\.weight_orig"):
            compress(model, strategy)
        return
    takes = strategy_class(strategy).parametrised
    if takes == "any" or (kind in STATELESS and takes == "stateless"):
        train(compress(model, strategy))
        check_rebuilds(model, kind, tmp_path / "a.safetensors")
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    remove = rf"0\.weight is computed from.*call torch\.nn\.utils\.{KINDS[kind][1]} first"
    with pytest.raises(InputError, match=remove) as caught:
        compress(model, strategy)
    assert "\n" not in str(caught.value)
    assert compression_of(model) is None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["stable_rps", "snip", "synflow", "rigl", "low_rank"])
def test_the_pattern_of_the_message_leaves_it_untouched(strategy, kind, tmp_path):
    with pytest.raises(InputError) as caught:
        compress(build(kind), "mag")
    pattern = str(caught.value).split("'")[1]
    model = build(kind)
    train(compress(model, strategy, exclude=[pattern]))
    assert compression_of(model).names == ["2.weight"]
    check_rebuilds(model, kind, tmp_path / "a.safetensors")


def test_the_way_out_of_the_message_works():
    for kind, (_, remove) in KINDS.items():
        module, _, function = remove.rpartition(".")
        model = build(kind)
        getattr(getattr(nn.utils, module) if module else nn.utils, function)(model[0], "weight")
        compress(model, "mag")
        assert compression_of(model).names == ["0.weight", "2.weight"]


def test_orthogonal_layers_start_at_the_identity_and_stay_untouched():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 3))
    for strategy in ("stable_rps", "mag"):
        other = compress(copy.deepcopy(model), strategy)
        assert compression_of(other).names == ["1.weight"]
    with pytest.raises(InputError, match=r"remove_parametrizations"):
        compress(model, "stable_rps", structured="share")


def test_densify_after_a_forward_pass_that_left_its_results_on_the_module():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.cache = {}

        def forward(self, x):
            self.last = self.cache["last"] = self.layer(x)
            return self.last

    model = compress(Remembers(), "stable_rps")
    x, _ = batch()
    expected = model(x)
    dense = memfold.densify(model)
    left = vars(dense)
    assert left["last"] is left["cache"]["last"]
    assert torch.equal(left["last"], expected)
    torch.testing.assert_close(dense(x), expected)
