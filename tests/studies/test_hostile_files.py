"""Files of studies that somebody else may have written are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from memfold.errors import InputError
from memfold.studies.choose_plan import read_plan

DEEP = "[" * 200_000
LARGE = "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested more than"),
        (f"seeds: [{LARGE}]", "Exceeds the limit"),
        (f"seeds: [0x{LARGE}]", "is no YAML|is missing"),
        ("&a [*a]", "it has an alias"),
        ("? [1, 2]\n: 3", "unhashable"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("seeds: 2026-01-01", "is missing"),
        ("null", "must be a mapping of bits, choose"),
    ],
)
def test_what_costs_or_runs_more_than_it_says(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    for read in READERS:
        with pytest.raises(
            InputError, match=message if read is read_plan else "file.yaml"
        ) as error:
            read(file)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


READERS: list[Any] = [read_plan]
PLAN = """
overrides: [logger=csv]
methods: {dense: [compression=dense]}
seeds: [1]
choose: {key: optimizer.lr, values: [0.1], seed: 11, at: {0.1: [0.1]}}
bits: []
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds: [1]", "seeds: [[1]]", "seeds.0 must be a whole number, got [1]"),
        ("seeds: [1]", "seeds: [true]", "seeds.0 must be a whole number, got True"),
        ("seeds: [1]", "seeds: [4294967296]", "seeds.0 must be below 4294967296"),
        ("seeds: [1]", f"seeds: [0x{LARGE}]", "got a number of thousands of digits"),
        ("values: [0.1]", "values: {a: 1}", "choose.values must be a list, got {'a': 1}"),
        ("values: [0.1]", "values: [.nan]", "choose.values.0 must be a finite number"),
        ("values: [0.1]", "values: [1e999]", "choose.values.0 must be a finite number"),
        ("[logger=csv]", "[[logger, csv]]", "overrides.0 must be a text"),
        ("[logger=csv]", "logger=csv", "overrides must be a list"),
        ("dense: [compression=dense]", "dense: {a: b}", "methods.dense must be a list"),
        ("{0.1: [0.1]}", "[[0.1]]", "choose.at must be a mapping"),
        ("bits: []", f"bits: [{', '.join(['8'] * 2)}]", "bits: 8 is there twice"),
        ("bits: []", "bits: []\n" + "x" * 1000 + ": 1", "is unknown; there are bits, choose"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    read_plan(file)
    assert before in PLAN
    file.write_text(PLAN.replace(before, after))
    with pytest.raises(InputError) as error:
        read_plan(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
