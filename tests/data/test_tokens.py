"""Ready-made files of tokens: any of their kinds, counted once, and what one token stands for."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memfold.data.spec import IGNORED, NextToken, Tokens
from memfold.data.text.token_files import map_tokens, write_tokens
from memfold.data.tokens import TokenFiles
from memfold.errors import InputError
from memfold.tasks import LanguageModelling, task_for
from memfold.training import run
from memfold.training.load import load_model
from training.jobs import compose_job

TOKENS = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint16)


_NAMES = {"uint16": "raw.bin", "array": "array.npy", "own": "own.bin"}


def files_in(folder: Path) -> dict[str, Path]:
    """The same tokens in every kind of file."""
    TOKENS.tofile(folder / "raw.bin")
    np.save(folder / "array.npy", TOKENS)
    write_tokens(folder / "own.bin", TOKENS)
    return {kind: folder / name for kind, name in _NAMES.items()}


@pytest.mark.parametrize("kind", _NAMES)
def test_every_token_is_a_target_once_in_one_split(kind: str, tmp_path: Path) -> None:
    dtype = "uint16" if kind == "uint16" else None
    data = TokenFiles(files=[str(files_in(tmp_path)[kind])], dtype=dtype, length=16)
    data.setup()
    assert data.spec.inputs == Tokens(int(TOKENS.max()) + 1, 16)
    assert np.array_equal(data.tokens("train")[0], TOKENS[:900])
    for begin, end, loader in (
        (900, 950, data.val_dataloader()),
        (950, 1000, data.test_dataloader()),
    ):
        found: Counter[int] = Counter()
        for inputs, targets in loader:
            found.update(targets[targets != IGNORED].tolist())
            assert inputs.dtype == torch.int64
        assert found == Counter(TOKENS[begin:end].tolist())


def test_files_for_the_splits_are_joined_in_their_order(tmp_path: Path) -> None:
    one, two, val, test = (str(tmp_path / f"{number}.bin") for number in range(4))
    for path in (one, two, val, test):
        write_tokens(Path(path), TOKENS)
    data = TokenFiles(files=[one, two], val_files=[val], test_files=[test], length=16)
    assert np.array_equal(data.tokens("train")[0], np.concatenate([TOKENS, TOKENS]))
    assert np.array_equal(data.tokens("test")[0], TOKENS)


def test_the_loss_is_primary_where_nobody_knows_the_bytes() -> None:
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    nats = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    for bytes_of, primary, value in (
        (None, ("loss", "nats per token"), None),
        (3.5, ("bpb", "bits per byte"), nats / math.log(2) / 3.5),
        (1, ("bpb", "bits per byte"), nats / math.log(2)),
    ):
        data = TokenFiles(files=["a"], vocabulary_size=7, bytes_per_token=bytes_of, length=5)
        assert data.spec.target == NextToken(7, bytes_of)
        task = task_for(data.spec, label_smoothing=0.0)
        assert isinstance(task, LanguageModelling)
        assert (task.primary.name, task.primary.unit) == primary
        assert task.primary.mode == task.directions[f"val/{task.primary.name}"] == "min"
        meters = task.meters()
        assert ("bpb" in meters) == (value is not None)
        if value is not None:
            meters["bpb"].update(logits, targets)
            assert float(meters["bpb"].compute()) == pytest.approx(value, rel=1e-6)


def test_a_run_is_judged_by_the_loss_and_needs_its_files_no_more(tmp_path: Path) -> None:
    file = files_in(tmp_path)["own"]
    overrides = (
        *("data=tokens", f"data.files=[{file}]", "data.length=8", "backbone=gpt", "seed=3"),
        *("backbone.width=8", "backbone.depth=1", "trainer=cpu", "logger=csv", "debug=fast"),
    )
    result = run(compose_job(tmp_path / "run", *overrides))
    assert result["primary"] == {"name": "val/loss", "mode": "min", "unit": "nats per token"}
    metrics = result["metrics"]
    assert metrics["val/best_loss"] == pytest.approx(metrics["val/loss"])
    assert not any("bpb" in name for name in metrics)
    file.unlink()
    assert load_model(tmp_path / "run").head.weight.shape == (int(TOKENS.max()) + 1, 8)
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {
        "vocabulary_size": int(TOKENS.max()) + 1
    }


def test_a_tokenizer_counts_bytes_and_pads_the_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from memfold.data.text.tokenizers import train_bpe

    trained = train_bpe(b"the quick brown fox " * 50, 280)
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    file, name = files_in(tmp_path)["own"], str(tmp_path / "tokenizer.json")
    data = TokenFiles(files=[str(file)], tokenizer=name, vocabulary_size=320)
    assert isinstance(trained.bytes_of, tuple)
    padding = (0,) * (320 - trained.vocabulary_size)
    assert data.bytes_of == trained.bytes_of + padding
    with pytest.raises(InputError, match=r"token \d+ at place \d+, and the vocabulary has \d+"):
        TokenFiles(files=[str(file)], tokenizer=name).setup()
    with pytest.raises(InputError, match=r"vocabulary_size=9: data\.tokenizer=.* has \d+ tokens"):
        TokenFiles(files=[str(file)], tokenizer=name, vocabulary_size=9).setup()


def test_token_files(tmp_path: Path) -> None:
    for dtype, high in ((np.uint16, 2**16), (np.uint32, 2**20)):
        tokens = np.random.default_rng(0).integers(0, high, 1000).astype(dtype)
        write_tokens(tmp_path / "t.bin", tokens)
        assert np.array_equal(map_tokens(tmp_path / "t.bin"), tokens)
    whole = (tmp_path / "t.bin").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"x" + whole[1:]):
        (tmp_path / "t.bin").write_bytes(damaged)
        with pytest.raises(InputError, match=r"t\.bin"):
            map_tokens(tmp_path / "t.bin")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"files": []}, r"data\.files must name files"),
        ({"dtype": "int8"}, r"data\.dtype must be uint16, uint32 or null, got 'int8'"),
        ({"vocabulary_size": 0}, r"data\.vocabulary_size must be .*, got 0"),
        ({"bytes_per_token": 0.0}, r"data\.bytes_per_token must be .* above 0"),
        ({"bytes_per_token": 4.0, "tokenizer": "t.json"}, "give one"),
        ({"vocabulary_size": 2**24 + 1}, r"data\.vocabulary_size must be .*16777216"),
        ({"val_files": ["a"]}, "give both, or neither"),
        ({"files": ["a\0"]}, r"data\.files must name files"),
        ({"files": ["a", "./a"]}, r"data\.files: a is in data\.files already"),
        (
            {"val_files": ["b"], "test_files": ["a"]},
            r"data\.test_files: a is in data\.files already",
        ),
    ],
    ids=str,
)
def test_bad_options_name_the_key(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        TokenFiles(**{"files": ["a"], **options})


def test_bad_files_give_one_line(tmp_path: Path) -> None:
    files_in(tmp_path)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    np.save(tmp_path / "reals.npy", TOKENS / 2)
    np.save(tmp_path / "signed.npy", TOKENS.astype(np.int64) - 5)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, TOKENS)
    write_tokens(tmp_path / "empty.bin", TOKENS[:0])
    (tmp_path / "text.bin").write_bytes(b"text, no tokens." * 99)
    np.save(tmp_path / "huge.npy", np.array([2**63 + 5] * 1000, dtype=np.uint64))
    for name, options, reason in (
        ("none.bin", {}, "No such file"),
        ("none.npy", {}, "expected an array of tokens"),
        ("raw.bin", {}, r"is no file of tokens: .*; data\.dtype=uint16 reads a file without"),
        ("own.bin", {"dtype": "uint16"}, r"has a header .*; leave data\.dtype out"),
        ("odd.bin", {"dtype": "uint16"}, "3 bytes are no whole number of uint16"),
        ("reals.npy", {}, r"is float64 of shape \(1000,\); expected whole numbers"),
        ("signed.npy", {}, r"token -5 at place \d+ is negative"),
        ("archive.npy", {}, "is an archive; expected one array"),
        ("objects.npy", {}, "expected an array of tokens"),
        (
            "own.bin",
            {"vocabulary_size": 200},
            r"token \d+ at place \d+, and the vocabulary has 200",
        ),
        (
            "text.bin",
            {"dtype": "uint32"},
            r"token 1954047348 at place 0, and no vocabulary has more than 16777216 tokens; is it "
            r"a file of uint32 tokens \(data\.dtype\)\?",
        ),
        ("huge.npy", {}, r"token 9223372036854775813 at place 0, and no vocabulary has more"),
        ("own.bin", {"length": 600}, r"899 tokens to predict, too few for windows of .*=600"),
        ("empty.bin", {}, "the train split has 0 tokens to predict"),
    ):
        with pytest.raises(InputError, match=reason) as raised:
            TokenFiles(files=[str(tmp_path / name)], **options).setup()
        assert "\n" not in str(raised.value), name
