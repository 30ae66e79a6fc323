"""Biases, norms and buffers in 16 bits: half of their bytes in the file, and nowhere else."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.artifact import header_bytes
from memfold.backbones import MLP
from memfold.compression import compression_of
from memfold.compression.accounting import state_tensors
from memfold.errors import InputError
from memfold.training import run
from strategies.cases import STRATEGIES, network_for, options_of
from training.jobs import SMALL, compose_job


def compressed(strategy, **options):
    """Compress a network, and give it untouched values that are no float16."""
    torch.manual_seed(0)
    model = network_for(strategy, 1, 6, 5, [12, 9])
    batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 5
    options = {**options_of(strategy), "seed": 1, **options}
    memfold.compress(model, strategy, data=[batch], loss=F.cross_entropy, **options)
    owned = compression_of(model).owned_names()
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name not in owned:
            nn.init.normal_(parameter, 1, 0.1)
    return model


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_holds_them_as_float16(strategy, bits, tmp_path):
    exact = compressed(strategy, bits=bits)
    model = compressed(strategy, bits=bits, untouched_bits=16)
    size = memfold.save(model, tmp_path / "a")
    counts, whole = memfold.footprint(model), memfold.footprint(exact)
    assert size == counts.stored_bytes + header_bytes(tmp_path / "a")
    assert whole.untouched_bytes == 2 * counts.untouched_bytes > 0
    assert whole.dense_bytes == counts.dense_bytes
    loaded = memfold.load(tmp_path / "a", network_for(strategy, 1, 6, 5, [12, 9]))
    assert memfold.footprint(loaded) == counts
    memfold.save(exact, tmp_path / "b")
    expected = memfold.load(tmp_path / "b", network_for(strategy, 1, 6, 5, [12, 9]))
    owned = compression_of(loaded).owned_names()
    changed = 0
    for name, tensor in state_tensors(expected).items():
        kept = tensor if name in owned else tensor.half().to(tensor.dtype)
        assert torch.equal(loaded.state_dict()[name], kept), name
        changed += not torch.equal(kept, tensor)
    assert changed > 0
    memfold.save(loaded, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("strategy", ["stable_rps", "snip", "low_rank", "small"])
def test_a_budget_counts_them_so(strategy, tmp_path):
    values = []
    for bits in (32, 16):
        torch.manual_seed(0)
        model = MLP(1, 6, 5, hidden_widths=[40, 30])
        batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 5
        options = {"budget_bytes": 3000, "untouched_bits": bits, "data": [batch]}
        memfold.compress(model, strategy, loss=F.cross_entropy, **options)
        size = memfold.save(model, tmp_path / "a")
        assert 0.9 * 3000 < size <= 3000
        values.append(memfold.footprint(model).num_values)
    assert values[1] > values[0]


def test_whole_numbers_and_half_precision_stay(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8).bfloat16())

    model = memfold.compress(build(), "stable_rps", ratio=0.5, untouched_bits=16)
    nn.init.constant_(model[2].bias, 1e30)
    model[1].num_batches_tracked.fill_(2**40 + 1)
    memfold.save(model, tmp_path / "a")
    loaded = memfold.load(tmp_path / "a", build())
    assert loaded[1].num_batches_tracked == 2**40 + 1
    assert torch.equal(loaded[2].bias, model[2].bias)


def test_a_part_has_its_own(tmp_path):
    part = memfold.compress(nn.Linear(20, 20), "stable_rps", ratio=0.5, untouched_bits=16)
    whole = nn.ModuleDict({"body": part, "head": nn.Linear(20, 2)})
    counts = memfold.footprint(whole)
    assert counts.untouched_bytes == 2 * 20 + 4 * 42
    assert counts.dense_bytes == 4 * (420 + 42)


def test_what_does_not_fit_is_named(tmp_path):
    model = memfold.compress(nn.Linear(20, 20), "stable_rps", ratio=0.5, untouched_bits=16)
    nn.init.constant_(model.bias, 1e6)
    with pytest.raises(InputError, match=r"^bias has values beyond 65504"):
        memfold.save(model, tmp_path / "a")
    with pytest.raises(InputError, match="untouched_bits must be 32 or 16, got 8"):
        memfold.compress(nn.Linear(9, 9), "stable_rps", untouched_bits=8)


def test_a_run_measures_what_is_stored(tmp_path):
    options = ("compression=stable_rps", "ratio=0.3", "artifact.untouched_bits=16")
    run(compose_job(tmp_path, *SMALL, *options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["compression"]["untouched_bits"] == 16
    assert result["metrics"]["packed/test/acc"] == pytest.approx(
        result["metrics"]["test/acc"], abs=0.02
    )
    assert "packed/val/acc" in result["metrics"]


@pytest.mark.parametrize("strategy", ["snip", "stable_rps"])
def test_what_is_stored_as_it_was_trained_is_measured_once(strategy, tmp_path):
    run(compose_job(tmp_path, *SMALL, f"compression={strategy}", "ratio=0.3"))
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert not [name for name in metrics if name.startswith("packed/")]
