"""Text: every byte is a target once, windows cross no boundary, tokens have their bytes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.data.python_docs import PythonDocs
from memfold.data.shakespeare import Shakespeare
from memfold.data.spec import IGNORED
from memfold.data.text import data_module
from memfold.data.text.data_module import SPLITS, Text, part_by_position
from memfold.data.text.tokenizers import FromLibrary, train_bpe
from memfold.data.text.windows import EvaluationWindows, TrainingWindows
from memfold.data.text_files import TextFiles
from memfold.errors import InputError

positions = st.integers(1, 60)


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    size: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    boundaries = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)))
    tokens = np.arange(size, dtype=np.uint16)
    windows = EvaluationWindows(tokens, length, stride=stride, boundaries=boundaries)
    targets: list[int] = []
    for window in range(len(windows)):
        inputs, found = (row[0].tolist() for row in windows[torch.tensor([window])])
        counted = [(i, token) for i, token in enumerate(found) if token != IGNORED]
        targets += [token for _, token in counted]
        for place, token in counted:  # numbers are places: what was seen is what came before
            seen = min(length - stride, token - max([0, *(b for b in boundaries if b < token)]) - 1)
            assert inputs[: place + 1] == list(range(token - place - 1, token))
            assert place >= seen
            assert not any(token - place <= b <= token for b in boundaries)
    firsts = {0, *boundaries}
    assert sorted(targets) == [token for token in range(size) if token not in firsts]


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_training_windows_cover_the_text_in_every_epoch(length: int, epoch: int, seed: int) -> None:
    windows = TrainingWindows(np.arange(100, dtype=np.uint8), length).at_epoch(seed, epoch)
    inputs, targets = windows[torch.arange(len(windows))]
    assert torch.equal(targets, inputs + 1)
    seen = targets.flatten().tolist()
    assert seen == list(range(seen[0], seen[-1] + 1))
    assert len(windows) == (100 - length) // length
    assert seen[0] <= length


def test_epochs_cut_at_other_places_and_alike_for_a_seed() -> None:
    windows = TrainingWindows(np.arange(1000, dtype=np.uint16), 50)
    starts = [int(windows.at_epoch(3, epoch)[torch.tensor([0])][0][0, 0]) for epoch in range(8)]
    assert len(set(starts)) > 3
    again = [int(windows.at_epoch(3, epoch)[torch.tensor([0])][0][0, 0]) for epoch in range(8)]
    assert starts == again


@given(st.text(min_size=8, max_size=80), st.floats(0.05, 0.4), st.floats(0.05, 0.4))
def test_parts_are_the_text_and_cut_no_character(text: str, val: float, test: float) -> None:
    content = text.encode("utf-8", errors="ignore")
    parts = part_by_position(Text(content), val, test)
    assert b"".join(parts[split].content for split in SPLITS) == content
    for part in parts.values():
        part.content.decode()


def test_documents_stay_whole_documents() -> None:
    text = Text.of([b"aaaa", b"bbbbbb", b"cc", b"dddddddd"])
    parts = part_by_position(text, 0.3, 0.2)
    joined = [document for split in SPLITS for document in parts[split].documents()]
    assert b"".join(joined) == text.content
    assert all(len(set(document)) == 1 for document in joined)


def test_python_docs_count_every_byte() -> None:
    data = PythonDocs(length=64, batch_size=7)
    data.setup()
    texts = data.read_text()
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        counts: Counter[int] = Counter()
        for _, targets in loader:
            counts.update(targets[targets != IGNORED].tolist())
        assert counts == Counter(texts[split].content)
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (7, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_two_ranks_see_the_windows_of_one() -> None:
    def loader(rank: int, world_size: int, batch_size: int) -> object:
        data = PythonDocs(length=512, batch_size=batch_size, seed=4)
        data.setup("fit")
        data._place_among_processes = lambda: (rank, world_size)  # type: ignore[method-assign]
        return data.train_dataloader()

    alone = [inputs for inputs, _ in loader(0, 1, 8)]
    shares = [[inputs for inputs, _ in loader(rank, 2, 4)] for rank in (0, 1)]
    joined = [torch.cat(pair) for pair in zip(*shares, strict=True)]
    assert all(torch.equal(one, two) for one, two in zip(alone, joined, strict=True))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return file


def test_own_files_with_documents_apart(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.txt"
    other.write_bytes(b"\xff" * 300)  # no UTF-8
    again, once_more = tmp_path / "c.txt", tmp_path / "d.txt"
    again.write_bytes(text_file.read_bytes())
    once_more.write_bytes(other.read_bytes())
    data = TextFiles(
        files=[str(text_file)],
        val_files=[str(other), str(again)],
        test_files=[str(once_more)],
        length=32,
        separate_documents=True,
    )
    data.setup()
    for inputs, targets in data.val_dataloader():
        for row, expected in zip(inputs, targets, strict=True):
            kinds = {int(token) == 255 for token in expected if token != IGNORED}
            assert len(kinds) == 1
            seen = {int(token) == 255 for token in row[1:] if token}
            assert seen <= kinds
    counted = sum(int((targets != IGNORED).sum()) for _, targets in data.val_dataloader())
    assert counted == 300 + len(text_file.read_bytes())


def test_bpe_is_trained_on_the_training_text_and_knows_its_bytes(text_file: Path) -> None:
    pytest.importorskip("tokenizers")
    data = TextFiles(files=[str(text_file)], tokenizer="bpe", vocabulary_size=300, length=8)
    data.setup()
    texts = data.read_text()
    bytes_of = data.tokenizer.bytes_of
    assert isinstance(bytes_of, tuple)
    for split in SPLITS:
        tokens = data.tokens(split)[0][1:]
        assert sum(bytes_of[token] for token in tokens) == len(texts[split].content)
        assert data.tokenizer.decode(tokens) == texts[split].content.decode()
    assert len(data.tokens("train")[0]) < len(texts["train"].content) / 2


def test_the_bytes_of_tokens_are_those_of_the_text(text_file: Path) -> None:
    pytest.importorskip("tokenizers")
    own = train_bpe(text_file.read_bytes(), 300)._tokenizer
    own.add_special_tokens(["<|end|>"])
    own.add_tokens(["quick"])
    every = "".join(map(chr, range(0x800))) + "\u20ac\U0001f600"
    text = f"THE quick<|end|>\n{every}".encode()
    tokenizer = FromLibrary("own", own)
    tokens = tokenizer.encode(text)
    assert sum(tokenizer.bytes_of[token] for token in tokens) == len(text) - len("<|end|>")


@pytest.mark.parametrize("kind", ["Lowercase", "Strip", "Replace", "prefix"])
def test_a_tokenizer_that_changes_the_text_is_refused(text_file: Path, kind: str) -> None:
    library = pytest.importorskip("tokenizers")
    own = train_bpe(text_file.read_bytes(), 300)._tokenizer
    if kind == "prefix":
        own.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        arguments = (library.Regex("[ -~]"), "a") if kind == "Replace" else ()
        own.normalizer = getattr(library.normalizers, kind)(*arguments)
    with pytest.raises(InputError, match=r"from byte \d on its tokens stand for b'.*bits per byte"):
        FromLibrary("own", own).encode(b"The end\n")


def test_tokens_that_somebody_has_cut_short_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(data_module, "_CACHED", 2000)
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 150)
    (tmp_path / "own.json").write_text(train_bpe(b"the quick brown fox\n" * 9, 300).to_json())
    options = {"files": [str(tmp_path / "a.txt")], "tokenizer": str(tmp_path / "own.json")}
    whole = TextFiles(**options, root=str(tmp_path)).tokens("train")[0]
    (cache,) = tmp_path.glob("text/tokens-*/tokens.bin")
    content = cache.read_bytes()
    for left in (content[: len(content) // 2], b"", None):
        cache.unlink() if left is None else cache.write_bytes(left)
        assert np.array_equal(TextFiles(**options, root=str(tmp_path)).tokens("train")[0], whole)


def test_the_tokenizer_of_a_run_is_read_back(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    options = {"files": [str(text_file)], "tokenizer": "bpe", "vocabulary_size": 300, "length": 8}
    first = TextFiles(**options)
    first.write_facts(tmp_path)
    text_file.unlink()
    second = TextFiles(**options)
    second.read_facts(tmp_path)
    assert second.spec == first.spec


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"files": []}, r"data\.files must name files, got \[\]"),
        ({"files": "a.txt"}, r"data\.files must be a list \(text each\), got 'a\.txt'"),
        ({"files": ["a.txt"], "val_files": ["b.txt"]}, "give both, or neither"),
        ({"files": ["a.txt"], "val_fraction": 0.5, "test_fraction": 0.5}, "leave something"),
        ({"files": ["a.txt"], "length": 0}, r"data\.length must be .* at least 1, got 0"),
        ({"files": ["a.txt"], "length": 8, "stride": 9}, r"data\.stride=9 must be at most"),
        (
            {"files": ["a.txt"], "vocabulary_size": 100},
            r"data\.vocabulary_size must be .*, got 100",
        ),
        ({"files": ["a.txt"], "tokenizer": 3}, r"data\.tokenizer must be text, got 3"),
    ],
    ids=str,
)
def test_bad_options_name_the_key(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        TextFiles(**options)


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (None, {}, "No such file"),
        (b"", {}, "is empty"),
        (
            b"short",
            {},
            r"data=text: the train split has 4 tokens to predict, too few .* data\.length=128",
        ),
        (b"\xff" * 900, {"tokenizer": "bpe"}, r"data\.tokenizer=bpe needs text in UTF-8"),
        (b"a" * 900, {"tokenizer": "none.json"}, r"data\.tokenizer=none\.json"),
    ],
)
def test_bad_files_give_one_line(
    tmp_path: Path, content: bytes | None, options: dict[str, str], reason: str
) -> None:
    if "tokenizer" in options:
        pytest.importorskip("tokenizers")
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        TextFiles(files=[str(file)], **options).setup()
    assert "\n" not in str(raised.value)


def test_another_file_is_not_shakespeare(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("To be, or not to be\n" * 100)
    with pytest.raises(InputError, match="is not the published file"):
        Shakespeare(root=str(tmp_path), download=False).setup("fit")
