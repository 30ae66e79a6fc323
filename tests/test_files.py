"""What somebody else's file may do to its reader."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfold.files import open_regular, parse_json, read_json, read_text, read_yaml_text

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("read", [open_regular, read_text, read_json, read_yaml_text])
def test_only_regular_files_are_read(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="is no regular file"):
            read(path)
    with pytest.raises(OSError, match="NUL"):
        read("a\0b")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


def test_a_file_of_any_size_costs_no_memory(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for read in (read_json, read_yaml_text):
        with pytest.raises(OSError, match="has more than"):
            read(tmp_path / "sparse")


@given(TREES)
def test_plain_json_is_read_as_it_is(tree):
    assert parse_json(json.dumps(tree)) == tree


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000 + "]" * 200_000, "deep"),
        ("[" * 600 + "]" * 600, "deep"),
        ("1" + "0" * 400, "too large"),
        ("[1e400]", "too large"),
        ("1" * 5000, "digits"),
        ("[NaN]", "no NaN"),
        ("-Infinity", "no -Infinity"),
        ('{"a": ', "Expecting"),
    ],
)
def test_json_that_cannot_be_written_again_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_halves_of_surrogate_pairs_become_their_escapes():
    value = parse_json(r'{"\udc00": ["a\ud800", 1]}')
    assert value == {"\\udc00": ["a\\ud800", 1]}
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def test_numbers_keep_their_type():
    assert [type(value) for value in parse_json("[1, 1.0, 1e2]")] == [int, float, float]  # type: ignore
    assert math.isclose(parse_json("1.7e308"), 1.7e308)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [*a]", "alias"),
        ("a: &a [x, x]\nb: [*a, *a]", "alias"),
        ("[" * 200_000, "deep"),
        ("- " * 200_000, "deep"),
        ("a: [1", "expected"),
        ("a: \0", "special characters"),
    ],
)
def test_yaml_that_is_no_tree_is_refused(text, reason, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_yaml_text(tmp_path / "a.yaml")


def test_yaml_is_given_as_it_is(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1, {b: '*c'}] # é\n", encoding="utf-8")
    assert read_yaml_text(tmp_path / "a.yaml") == "a: [1, {b: '*c'}] # é\n"
