"""Artifacts hold what the footprint claims, and bad ones are refused without a trace."""

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import memfold
from forging import forge
from memfold.artifact import header_bytes
from memfold.backbones.mlp import MLP
from memfold.compression import compression_of
from memfold.compression.budget import Budget, Stored, like
from memfold.compression.selection import named_weights
from memfold.errors import InputError
from memfold.file_format import unpack
from memfold.strategies.pruning.stored_masks import stored_like
from strategies.cases import ANY_MODULE, options_of
from strategies.models import MODELS, build, compressed_or_skipped, make_input


def small_model(width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 16, 4)
    )


@pytest.fixture
def artifact(tmp_path):
    path = tmp_path / "model.safetensors"
    memfold.save(memfold.compress(small_model(), "stable_rps", ratio=0.3), path)
    return path


@pytest.mark.parametrize("model_name", sorted(MODELS))
@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_a_file_takes_the_stored_bytes_and_its_header(strategy, model_name, tmp_path):
    model = compressed_or_skipped(strategy, model_name)
    path = tmp_path / "model.safetensors"
    size = memfold.save(model, path)
    assert size == path.stat().st_size
    assert size == memfold.footprint(model).stored_bytes + header_bytes(path)
    assert size == counted(model, build(model_name))


def counted(model, dense):
    """Return the size of the file of a model, counted on its backbone and without values."""
    found = compression_of(model)
    values, indices = (
        {name: like(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (found.value_tensors(), found.index_tensors())
    )
    budget = Budget(found.strategy, dense, named_weights(dense, found.names))
    return budget.file_bytes(Stored(found.num_values, values, indices))


@given(st.integers(2, 200), st.sampled_from([8, 6, 4, 3]), st.floats(0.05, 0.95), st.integers(1, 5))
def test_coding_never_makes_a_file_larger_than_what_was_counted(
    tmp_path_factory, rows, bits, ratio, power
):
    model, dense = nn.Linear(20, rows), nn.Linear(20, rows)
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(rows)).pow_(power)
    memfold.compress(model, "mag", ratio=ratio, bits=bits, coding="huffman", structured="share")
    found = compression_of(model)
    plain = stored_like(found.num_values, found.counts, found.shapes, found.dtype)
    budget = Budget(found.strategy, dense, named_weights(dense, found.names))
    path = tmp_path_factory.getbasetemp() / "coded.safetensors"
    assert memfold.save(model, path) <= budget.file_bytes(plain)


@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_coding_loses_nothing_and_is_counted(strategy, tmp_path):
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    found = {}
    for coding in ("none", "huffman"):
        torch.manual_seed(0)
        model = MLP(1, 8, 10)
        data = [(torch.randn(20, 1, 8, 8), torch.arange(20) % 10)]
        options = options_of(strategy, ratio=0.2) | {"bits": 4, "coding": coding}
        memfold.compress(model, strategy, data=data, loss=F.cross_entropy, **options)
        size, counts = memfold.save(model, path), memfold.footprint(model)
        assert size == counts.stored_bytes + header_bytes(path)
        read = memfold.load(path, MLP(1, 8, 10)).eval()
        assert memfold.footprint(read) == counts
        memfold.save(read, again)
        assert again.read_bytes() == path.read_bytes()
        found[coding] = counts, read(data[0][0])
    assert torch.equal(found["none"][1], found["huffman"][1])
    plain, coded = (found[coding][0] for coding in ("none", "huffman"))
    assert coded.index_bytes <= plain.index_bytes
    compression = compression_of(model)
    assert (coded.index_bytes < plain.index_bytes) == (compression.index_format == "gaps")
    # Positions of a fifth take 0.72 of their bitmask; normal values 0.9 of four bits.
    part = 0.79 if strategy == "supermask" else 0.93
    assert coded.stored_bytes - coded.untouched_bytes < part * (
        plain.stored_bytes - plain.untouched_bytes
    )


def test_a_file_has_the_mode_of_any_other(artifact):
    other = artifact.with_name("other")
    other.touch()
    assert artifact.stat().st_mode == other.stat().st_mode


def test_the_strategy_is_stored_as_data(artifact):
    with safe_open(artifact, framework="pt") as file:
        record, _ = unpack(file.metadata()["memfold"], load_file(artifact))
    strategy = record["strategy"]
    assert strategy["name"] == "stable_rps"
    assert strategy["ratio"] == 0.3
    assert strategy["gradient_scale"] == "length"


def test_a_plain_model_is_stored_as_dense(tmp_path):
    model = small_model()
    memfold.save(model, tmp_path / "plain.safetensors")
    with torch.no_grad():
        other = small_model()
        other[0].weight.zero_()
    memfold.load(tmp_path / "plain.safetensors", other)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_either_form_has_the_same_function(strategy, tmp_path):
    saved = compressed_or_skipped(strategy, "conv2d").eval()
    memfold.save(saved, tmp_path / "a.safetensors")
    compressed = memfold.load(tmp_path / "a.safetensors", build("conv2d")).eval()
    fresh = build("conv2d")
    dense = memfold.load(tmp_path / "a.safetensors", fresh, form="dense").eval()
    x = make_input("conv2d")
    assert dense is fresh
    torch.testing.assert_close(compressed(x), saved(x))
    torch.testing.assert_close(dense(x), saved(x))
    assert compression_of(compressed) is not None
    assert compression_of(dense) is None
    assert dense.state_dict().keys() == build("conv2d").state_dict().keys()
    assert [type(module) for module in dense.modules()] == [
        type(module) for module in build("conv2d").modules()
    ]


def test_there_are_two_forms(artifact):
    model = small_model()
    with pytest.raises(InputError, match="form must be compressed or dense, got 'sparse'"):
        memfold.load(artifact, model, form="sparse")
    assert compression_of(model) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def hold_a_pickle(path):
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


def hold_a_torch_file(path):
    torch.save({"a": torch.zeros(3)}, path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, hold_a_pickle, hold_a_torch_file, remove])
def test_damaged_files_are_refused(damage, artifact):
    damage(artifact)
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        memfold.load(artifact, model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_foreign_safetensors_and_unknown_strategies_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a memfold artifact"):
        memfold.load(path, small_model())
    record = {"version": 2, "num_values": 3, "weights": [], "strategy": {"name": "magic"}}
    for damaged, message in (
        (json.dumps(record), "magic is unknown"),
        (json.dumps(record | {"version": 1}), r"has version '1', expected one of \(2, 3, 4, 5\)"),
        (json.dumps({"version": 2}), "damaged metadata"),
        ("{", "damaged metadata"),
        ("[]", "damaged metadata"),
    ):
        save_file({"a": torch.zeros(3)}, path, {"memfold": damaged})
        with pytest.raises(InputError, match=message):
            memfold.load(path, small_model())


def test_the_same_model_gives_the_same_bytes(artifact, tmp_path):
    other = tmp_path / "other.safetensors"
    memfold.save(memfold.compress(small_model(), "stable_rps", ratio=0.3), other)
    assert other.read_bytes() == artifact.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        small_model(width=7),
        nn.Sequential(nn.Linear(3, 4)),
        nn.Sequential(*small_model(), nn.Linear(4, 4)),
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)),
    ],
    ids=["wider", "another", "longer", "shorter"],
)
def test_another_backbone_is_refused_and_unchanged(other, artifact):
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(InputError, match="another backbone"):
        memfold.load(artifact, other)
    after = other.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_save_keeps_the_earlier_file(artifact, monkeypatch):
    before = artifact.read_bytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("memfold.artifact_file.header", full_disk)
    with pytest.raises(OSError, match="No space"):
        memfold.save(small_model(), artifact)
    assert artifact.read_bytes() == before
    assert [p.name for p in artifact.parent.iterdir()] == [artifact.name]


FORGERIES = {
    "negative_count": lambda r, t: r.update(num_values=-1),
    "huge_count": lambda r, t: r.update(num_values=10**30),
    "truth_as_count": lambda r, t: r.update(num_values=True),
    "no_shape": lambda r, t: r.update(values=[["kept_values", None]]),
    "text_as_shape": lambda r, t: r.update(values=[["kept_values", "abc"]]),
    "fraction_in_shape": lambda r, t: r.update(values=[["kept_values", [154.0]]]),
    "negative_shape": lambda r, t: r.update(values=[["kept_values", [-1, -154]]]),
    "name_twice": lambda r, t: r.update(values=r["values"] * 2),
    "bias_of_one": lambda r, t: (
        r.update(reshaped={"0.bias": [16]}),
        t.update({"0.bias": torch.ones(1)}),
    ),
    "bias_of_four": lambda r, t: (
        r.update(reshaped={"0.bias": [16]}),
        t.update({"0.bias": torch.ones(4)}),
    ),
    "bias_missing": lambda r, t: (r.update(reshaped={"0.bias": [16]}), t.pop("0.bias")),
    "fingerprint_empty": lambda r, t: t.update(kept_fingerprint=torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize("forgery", sorted(FORGERIES))
def test_forged_files_are_refused_in_one_line(forgery, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    path = tmp_path / "model.safetensors"
    memfold.save(memfold.compress(build(), "rand", ratio=0.6), path)
    forge(path, FORGERIES[forgery])
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        memfold.load(path, model)
    assert "\n" not in str(error.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
