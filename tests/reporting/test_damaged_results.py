"""Results that cannot be right are named, and the other runs are read."""

import pytest

from memfold.reporting.reading import read
from reporting.fabricated import reasons, result, write_run

BAD_TEXTS = {
    "truncated": ('{"status": "compl', "result.json is truncated or no JSON"),
    "empty": ("", "result.json is truncated or no JSON"),
    "list": ("[1, 2]", "the contents must be a mapping, got [1, 2]"),
    "number": ("3", "the contents must be a mapping, got 3"),
    "deep": ("[" * 100_000, "result.json is truncated or no JSON"),
}
BAD_VALUES = {
    "failed": ({"status": "failed", "error": "disk full"}, "failed: disk full (stable_rps"),
    "no status": ({"status": None}, "status must be a text, got None"),
    "no metrics": ({"metrics": None}, "metrics must be a mapping, got None"),
    "no accuracy": ({"metrics": {}}, "metrics.test/acc must be a number, got None"),
    "above 1": ({"metrics__test/acc": 1.01}, "metrics.test/acc must be at most 1, got 1.01"),
    "percent": ({"metrics__test/acc": 93.5}, "must be at most 1, got 93.5"),
    "negative": ({"metrics__test/acc": -0.1}, "metrics.test/acc must be at least 0"),
    "NaN": ({"metrics__test/acc": float("nan")}, "JSON knows no NaN"),
    "infinite": ({"metrics__test/acc": float("inf")}, "JSON knows no Infinity"),
    "text": ({"metrics__test/acc": "0.9"}, "metrics.test/acc must be a number, got '0.9'"),
    "true": ({"metrics__test/acc": True}, "metrics.test/acc must be a number, got True"),
    "no bytes": ({"memory__stored_bytes": 0}, "memory.stored_bytes must be at least 1, got 0"),
    "half bytes": ({"memory__stored_bytes": 1.5}, "memory.stored_bytes must be a whole number"),
    "huge": ({"memory__stored_bytes": 10**400}, "is too large"),
    "huge time": ({"time__fit_seconds": 10**400}, "is too large"),
    "ratio 0": ({"compression__ratio": 0}, "compression.ratio must be at least"),
    "asked 0": ({"compression__requested_ratio": 0}, "compression.requested_ratio must be at"),
    "2 bits": (
        {"compression__bits": 2},
        "compression.bits must be 32, 16, 8, 7, 6, 5, 4 or 3, got 2",
    ),
    "no packed": ({"compression__bits": 8}, "metrics.packed/test/acc must be a number, got None"),
    "data": ({"data": {"name": "x"}}, "data must be a text"),
    "seed": ({"seed": None}, "seed must be a whole number, got None"),
    "memory": ({"memory": [1]}, "memory must be a mapping, got [1]"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_damaged_result_is_named_and_the_rest_is_read(here, text, reason):
    (here / "bad").mkdir()
    (here / "bad" / "result.json").write_text(text)
    write_run(here / "good", result())
    runs, problems = read([here])
    assert [run.folder for run in runs] == ["good"]
    assert len(problems) == 1
    assert reason in reasons(problems)["bad"]


@pytest.mark.parametrize(("changes", "reason"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_result_that_cannot_be_right_is_named(here, changes, reason):
    write_run(here / "bad", result(**changes))
    write_run(here / "good", result(seed=2))
    runs, problems = read([here])
    assert [run.folder for run in runs] == ["good"]
    assert len(problems) == 1
    assert reason in reasons(problems)["bad"]
