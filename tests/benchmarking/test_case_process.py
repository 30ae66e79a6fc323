import subprocess

import pytest

from memfold.benchmarking import case_process
from memfold.benchmarking.case_process import launch, run_group
from memfold.benchmarking.cases import Case

DENSE = Case(model="mlp_tiny", batch_size=4, threads=1, warmup=1, steps=2)
SHARED = Case(**{**DENSE.to_dict(), "strategy": "stable_rps", "ratio": 0.1})
# 32-64-64-10 with biases.
PARAMETER_BYTES = 4 * (32 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10)


def test_rounds_visit_all_cases_in_turn_and_leave_out_what_failed():
    order = []

    def run(case):
        order.append(case.name)
        return {"error": "no"} if case is SHARED and len(order) > 2 else {"step_seconds": 1.0}

    found = run_group([DENSE, SHARED], 3, run=run, report=lambda *_: None)
    assert order == ["dense", "stable_rps 0.1", "dense", "stable_rps 0.1", "dense"]
    assert found == [[{"step_seconds": 1.0}] * 3, [{"step_seconds": 1.0}, {"error": "no"}]]


def test_a_case_is_measured_in_a_process_of_its_own():
    found = launch(SHARED)
    assert "error" not in found, found
    values = round(0.1 * (32 * 64 + 64 * 64 + 64 * 10))
    expected = 4 * (values + 64 + 64 + 10)
    for key in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "grad_sync_bytes"):
        assert found[key] == expected, key
    assert found["train_state_bytes"] >= 3 * expected
    assert found["stored_bytes"] < found["artifact_bytes"] < PARAMETER_BYTES
    assert found["saved_bytes"] >= 2 * 4 * 64 * 4  # two hidden layers, batch 4
    assert found["peak_bytes"] > 0
    assert len(found["steps"]) == 2
    assert found["samples_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert found["densified_latency_1_seconds"] > 0


def test_a_case_that_fails_says_why_in_one_line():
    wrong = Case(**{**SHARED.to_dict(), "options": {"include": ["nowhere"]}})
    error = launch(wrong)["error"]
    assert error.startswith("InputError: compression.include='nowhere' matches no")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (-9, "", "killed by SIGKILL (out of memory?)"),
        (-11, "", "killed by SIGSEGV"),
        (2, "", "exit status 2: last"),
        (0, "noise\n{}", None),
    ],
)
def test_processes_that_end_without_a_word_are_reported(monkeypatch, status, output, expected):
    ended = subprocess.CompletedProcess([], status, output, "first\nlast\n")
    monkeypatch.setattr(case_process.subprocess, "run", lambda *_, **__: ended)
    assert launch(DENSE).get("error") == expected


def test_processes_that_hang_are_reported(monkeypatch):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(case_process.subprocess, "run", hang)
    assert launch(DENSE)["error"] == "not finished after 1800 seconds"
