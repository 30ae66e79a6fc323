"""The file of an artifact: small tensors are bytes in one, under a compressed record."""

import base64
import json
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import nn

import memfold
from forging import forge
from memfold import backbones
from memfold.artifact import header_bytes
from memfold.errors import InputError
from memfold.file_format import file_bytes, header, pack, unpack
from strategies.cases import options_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
DTYPES += (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
NETWORKS = {
    "resnet20": lambda: backbones.ResNet20(3, 32, 10),
    "vit": lambda: backbones.ViT(3, 32, 10),
    "table_transformer": lambda: backbones.TableTransformer(7, [3, 5], 2),
    "mlp": lambda: backbones.MLP(1, 28, 10),
    "gpt": lambda: backbones.GPT(256, 128),
}


kinds = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)), max_size=12
)


@given(kinds)
def test_tensors_of_any_kind_and_size_come_back(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{number}.weight": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }
    contents = {"version": 5, "any": ["thing"]}
    text, stored = pack(contents, tensors, 4_000_000_000)
    assert sum(t.nbytes for t in stored.values()) == sum(t.nbytes for t in tensors.values())
    found, again = unpack(text, stored)
    assert found == {**contents, "checksum": 4_000_000_000}
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


@given(kinds)
def test_the_size_of_a_file_is_known_before_its_values(
    kinds: list[tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {
        f"{number}.wéight": torch.zeros(shape, dtype=dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }
    contents = {"version": 5, "any": ["thing"]}
    text, stored = pack(contents, tensors, 0)
    file = header(text, stored) + b"".join(
        t.view(-1).view(torch.uint8).numpy().tobytes() for t in stored.values()
    )
    like = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    assert len(file) == file_bytes(contents, like)
    found = load_bytes(file)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in stored.items()
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("strategy", ["dense", "stable_rps", "mag", "low_rank", "hashednet"])
def test_a_file_is_hardly_larger_than_what_it_stores(strategy: str, network: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    ratio = {"dense": {}, "low_rank": {"ratio": 0.3}}.get(strategy, {"ratio": 0.02})
    memfold.compress(model, strategy, **ratio)
    size = memfold.save(model, tmp_path / "a")
    assert size <= 1.05 * memfold.footprint(model).stored_bytes + 2000
    if network == "resnet20" and strategy != "dense":
        assert header_bytes(tmp_path / "a") <= 2000


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("strategy", ["dense", "stable_rps", "mag", "low_rank", "supermask"])
def test_files_of_earlier_versions_are_still_read(strategy: str, version: int, tmp_path) -> None:
    """Version 3 names every tensor in the header, version 4 has the checksum in the record."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return backbones.MLP(1, 4, 3, hidden_widths=[6, 5])

    batch = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    options = {"loss": nn.functional.cross_entropy, **options_of(strategy)}
    model = memfold.compress(build(), strategy, data=[batch], **options)
    memfold.save(model, tmp_path / "a")
    forge(tmp_path / "a", lambda contents, _: contents.update(version=version))
    with torch.no_grad():
        assert torch.equal(memfold.load(tmp_path / "a", build())(batch[0]), model(batch[0]))


def record(**packed: object) -> bytes:
    return json.dumps({"version": 5, "packed": packed}).encode()


HOSTILE = {
    "no record": (b"[]", "no mapping"),
    "too little": (record(float32=[["a", [9]]]), "a comes twice or is cut off"),
    "too much": (record(float32=[["a", [1]]]), "more than the record says"),
    "twice": (record(float32=[["a", [1]]], uint8=[["a", [4]]]), "a comes twice"),
    "beside": (record(float32=[["b", [2]]]), "b comes twice"),
    "no shape": (record(float32=[["a", [-2]]]), "whole numbers"),
    "no dtype": (record(quint8=[["a", [8]]]), "quint8"),
    "too long": (record(float32=[["a", [2]]]) + b" " * 2000, "too long"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_refused(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfold.file_format._LONGEST_RECORD", 1000)
    content, message = HOSTILE[name]
    text = f"5:00000000:{base64.b85encode(zlib.compress(content)).decode()}"
    small = torch.zeros(8, dtype=torch.uint8)
    for cut, reason in ((0, message), (6, "damaged metadata")):
        stored = {"memfold.small_tensors": small, "b": torch.zeros(2)}
        save_file(stored, tmp_path / "a", {"memfold": text[: len(text) - cut]})
        with pytest.raises(InputError, match=f"damaged metadata .*{reason}|damaged metadata") as e:
            memfold.load(tmp_path / "a", nn.Linear(2, 2))
        assert cut or reason in str(e.value)
    save_file({"memfold.small_tensors": small.float()}, tmp_path / "a", {"memfold": text})
    with pytest.raises(InputError, match="damaged metadata"):
        memfold.load(tmp_path / "a", nn.Linear(2, 2))


def test_a_name_of_the_format_is_refused(tmp_path) -> None:
    model = nn.ModuleDict({"memfold": nn.Module()})
    model["memfold"].small_tensors = nn.Parameter(torch.zeros(5000))
    model["other"] = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"memfold\.small_tensors is a name of the format's"):
        memfold.save(model, tmp_path / "a")
