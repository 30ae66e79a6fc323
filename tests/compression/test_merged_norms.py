"""BatchNorm in a file: two numbers for each channel, with which the model evaluates as before."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.artifact import header_bytes
from memfold.backbones import ResNet20
from memfold.compression import compression_of
from memfold.compression.accounting import state_tensors
from memfold.compression.budget import Budget
from memfold.compression.merged_norms import merge, merged_in, separate
from memfold.compression.selection import select_weights
from memfold.training import run
from training.jobs import SMALL, compose_job


def resnet():
    torch.manual_seed(0)
    return ResNet20(1, 8, 5).double()


def images():
    return torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def trained(strategy, **options):
    """Compress a network whose norms have seen data."""
    model, batch = resnet(), (images(), torch.arange(6) % 5)
    memfold.compress(model, strategy, data=[batch], loss=F.cross_entropy, **options)
    model.train()
    for _ in range(3):
        model(3 * images() + 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("strategy", ["dense", "stable_rps", "snip", "low_rank", "small"])
def test_a_merged_file_is_smaller_and_computes_the_same(strategy, bits, tmp_path):
    options = {"bits": bits, "merge_norms": True}
    options |= {} if strategy == "dense" else {"ratio": 0.3}
    model, plain = (trained(strategy, **{**options, "merge_norms": m}) for m in (True, False))
    counts, whole = memfold.footprint(model), memfold.footprint(plain)
    size = memfold.save(model, tmp_path / "a")
    assert size == counts.stored_bytes + header_bytes(tmp_path / "a")
    assert counts.dense_bytes == whole.dense_bytes
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    numbers = sum(2 * norm.num_features + 1 for norm in norms)
    assert whole.untouched_bytes - counts.untouched_bytes == 8 * numbers
    memfold.save(plain, tmp_path / "b")
    expected = memfold.load(tmp_path / "b", resnet()).eval()(images())
    loaded = memfold.load(tmp_path / "a", resnet()).eval()
    dense = memfold.load(tmp_path / "a", resnet(), form="dense").eval()
    for found in (loaded, dense):
        torch.testing.assert_close(found(images()), expected, rtol=1e-6, atol=1e-6)
    assert memfold.footprint(loaded) == counts
    memfold.save(loaded, tmp_path / "c")
    again = memfold.load(tmp_path / "c", resnet()).eval()
    torch.testing.assert_close(again(images()), loaded(images()), rtol=1e-6, atol=1e-6)


def test_statistics_are_made_whatever_the_default_device_is(tmp_path):
    model, fresh = trained("stable_rps", ratio=0.3, merge_norms=True), resnet()
    memfold.save(model, tmp_path / "a")
    with torch.device("meta"):
        loaded = memfold.load(tmp_path / "a", fresh).eval()
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["stable_rps", "snip", "low_rank", "small"])
def test_a_budget_holds_more_values(strategy, tmp_path):
    values = []
    for merges in (False, True):
        options = {"budget_bytes": 90_000, "merge_norms": merges, "bits": 8}
        model = trained(strategy, **options)
        assert 0.95 * 90_000 < memfold.save(model, tmp_path / "a") <= 90_000
        values.append(memfold.footprint(model).num_values)
    assert values[1] > 1.05 * values[0]


class Block(nn.Module):
    def __init__(self, norm, width=16):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(width, width),
            norm(width),
            nn.Linear(width, 16),
        )

    def forward(self, x):
        return x + self.last(self.norm(self.first(x)).relu())


def blocks(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(norm) for _ in range(4)]).double()


@pytest.mark.parametrize("whose", ["own", "shared"])
@pytest.mark.parametrize("merges", [False, True])
def test_a_budget_knows_which_norms_and_biases_become_one(merges, whose, tmp_path):
    for biases in ("own", "shared"):
        options = {"norms": whose, "biases": biases, "merge_norms": merges}
        model = memfold.compress(blocks(), "recursive_lora", budget_bytes=19_000, **options)
        dense, state = blocks(), compression_of(model)
        budget = Budget(state.strategy, dense, select_weights(dense))
        size = memfold.save(model, tmp_path / "a")
        assert size == budget.file_bytes(state.described(torch.float64)) <= 19_000


@pytest.mark.parametrize("other", [partial(nn.GroupNorm, 4), nn.LayerNorm, "untracked"])
def test_a_merged_norm_is_no_norm_of_another_kind(other, tmp_path):
    if other == "untracked":
        other = partial(nn.BatchNorm1d, track_running_stats=False)
    for kinds in ((nn.BatchNorm1d, other), (other, nn.BatchNorm1d)):
        saved, fresh = map(blocks, kinds)
        memfold.compress(saved, "stable_rps", ratio=0.3, merge_norms=True)
        memfold.save(saved, tmp_path / "a")
        memfold.load(tmp_path / "a", blocks(kinds[0]))
        with pytest.raises(memfold.InputError, match="another backbone: of its BatchNorms"):
            memfold.load(tmp_path / "a", fresh)


def test_a_norm_without_its_statistics_is_loaded_without(tmp_path):
    def build(width):
        norm = nn.BatchNorm1d(width)
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        return norm

    model = memfold.compress(blocks(build), "stable_rps", ratio=0.3, merge_norms=True).eval()
    memfold.save(model, tmp_path / "a")
    x = torch.randn(8, 16, dtype=torch.float64)
    loaded = memfold.load(tmp_path / "a", blocks(build)).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)


def test_merging_twice_is_merging_once():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9, eps=0.03))
    model.train()(torch.randn(20, 6) + 2)
    nn.init.normal_(model[1].weight)
    once = merge(model, state_tensors(model))
    assert once.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    fresh = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9, eps=0.03))
    fresh.load_state_dict(once | separate(fresh, once))
    twice = merge(fresh, state_tensors(fresh))
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=2**-23, atol=0)
    x = torch.randn(4, 6)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    """Norms that cannot be merged, and one that can."""

    def __init__(self):
        super().__init__()
        self.plain = nn.BatchNorm1d(12)
        self.without_weights = nn.BatchNorm1d(12, affine=False)
        self.without_statistics = nn.BatchNorm1d(12, track_running_stats=False)
        self.first, self.second = nn.BatchNorm1d(12), nn.BatchNorm1d(12)
        self.second.weight = self.first.weight
        self.instance = nn.InstanceNorm1d(12, affine=True, track_running_stats=True)
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        for norm in (self.plain, self.without_weights, self.without_statistics):
            x = norm(x)
        x = self.second(self.linear(self.first(x)))
        return self.instance(x[:, :, None].expand(-1, -1, 3)).flatten(1)


def test_norms_that_share_or_lack_tensors_stay_whole(tmp_path):
    torch.manual_seed(0)
    model = memfold.compress(Odd().double(), "stable_rps", ratio=0.5, merge_norms=True)
    x = torch.randn(8, 12, dtype=torch.float64)
    model.train()(x)
    statistics = {f"plain.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert merged_in(model, state_tensors(model)) >= statistics
    memfold.save(model, tmp_path / "a")
    loaded = memfold.load(tmp_path / "a", Odd().double()).eval()
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded.second.running_mean, model.second.running_mean)
    with pytest.raises(memfold.InputError, match="is of another backbone: it has no"):
        memfold.load(tmp_path / "a", nn.Sequential(Odd().double()))


def test_a_run_measures_the_merged_file(tmp_path):
    options = ("compression=stable_rps", "ratio=0.3", "artifact.merge_norms=true")
    job = compose_job(tmp_path, *SMALL, *options, "backbone=cnn")
    run(job)
    result = json.loads((tmp_path / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["packed/test/acc"] == pytest.approx(metrics["test/acc"], abs=0.01)
    assert result["compression"]["merge_norms"] is True
