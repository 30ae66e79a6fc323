"""Models without values are filled by artifacts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from strategies.cases import STRATEGIES, network_for, options_of
from strategies.meta import LeavesItsScale, folded, mlp, on_meta, refusal, tensors_of
from strategies.models import TiedLanguageModel


class Unwilling(nn.Linear):
    def reset_parameters(self):
        if not self.weight.is_meta:
            raise OSError("never")


@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_artifacts_need_no_values(form, tmp_path):
    saved = memfold.compress(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), "stable_rps")
    saved[1].running_mean.fill_(0.5)
    memfold.save(saved, tmp_path / "a.safetensors")
    fresh = on_meta(lambda: nn.Sequential(Unwilling(6, 8), nn.BatchNorm1d(8)))
    loaded = memfold.load(tmp_path / "a.safetensors", fresh, form=form)
    x = torch.randn(4, 6)
    assert torch.equal(loaded.eval()(x), saved.eval()(x))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert isinstance(loaded[0].weight, nn.Parameter) == (form == "dense")


def test_an_artifact_without_compression_fills_a_model(tmp_path):
    saved = TiedLanguageModel()
    memfold.save(saved, tmp_path / "a.safetensors")
    loaded = memfold.load(tmp_path / "a.safetensors", on_meta(TiedLanguageModel))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens), saved(tokens))
    assert loaded.head.weight is loaded.embedding.weight


def recurrent():
    return nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 6))


def test_untouched_recurrent_layers_run(tmp_path):
    model = folded(on_meta(recurrent), ratio=0.5, exclude=["1"])
    x = torch.randn(3, 2, 4)
    output, _ = model(x)
    assert output.isfinite().all()
    memfold.save(model, tmp_path / "a.safetensors")
    loaded = memfold.load(tmp_path / "a.safetensors", on_meta(recurrent))
    assert torch.equal(loaded(x)[0], output)


def test_artifacts_cannot_fill_what_they_do_not_hold(tmp_path):
    memfold.save(memfold.compress(mlp(), "rand"), tmp_path / "pruned.safetensors")
    model = on_meta(mlp)
    with refusal("0.weight is on the meta device and has no values"):
        memfold.load(tmp_path / "pruned.safetensors", model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    saved = memfold.compress(LeavesItsScale(6, 8), "stable_rps")
    memfold.save(saved, tmp_path / "shared.safetensors")
    model = on_meta(lambda: LeavesItsScale(6, 8))
    before = tensors_of(model)
    with refusal("table is on the meta device and not in the artifact"):
        memfold.load(tmp_path / "shared.safetensors", model)
    assert tensors_of(model) == before


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_nothing_depends_on_the_default_device(name, tmp_path):
    torch.manual_seed(0)
    case = STRATEGIES[name]
    network, fresh = (network_for(name, 1, 8, 10, (32, 32)) for _ in range(2))
    batches = [(torch.randn(20, 1, 8, 8), torch.arange(20) % 10)]
    with torch.device("meta"):
        model = memfold.compress(
            network, name, data=batches, loss=F.cross_entropy, **options_of(name, ratio=case.ratio)
        )
        counts = memfold.footprint(model)
        memfold.save(model, tmp_path / "a")
        loaded, dense = memfold.load(tmp_path / "a", fresh), memfold.densify(model)
    assert memfold.footprint(loaded) == counts
    x, _ = batches[0]
    expected = model.eval()(x)
    for found in (loaded, dense):
        torch.testing.assert_close(found.eval()(x), expected, rtol=1e-4, atol=1e-5)
