"""Choices among runs that have learnt nothing, and choices at the end of a list."""

from math import sqrt

from hypothesis import given
from hypothesis import strategies as st

from memfold.studies.choose import doubts
from memfold.studies.choose_plan import PlannedRun

AT_CHANCE, AT_EDGE = "chance level", "edge of the list"
VALUES = (0.01, 0.03, 0.1, 0.3, 1.0)
RUNS = [PlannedRun(f"rand-{value}", "rand", 0.01, value, ()) for value in VALUES]


def result_of(accuracy, chance=0.1, num_samples=6000):
    return {"metrics": {"val/acc": accuracy}, "chance": chance, "samples": {"val": num_samples}}


def doubts_of(accuracies, other=0.8968, **facts):
    results = {
        run.name: result_of(accuracy, **facts)
        for run, accuracy in zip(RUNS, accuracies, strict=True)
        if accuracy is not None
    }
    best = max(
        (run for run in RUNS if run.name in results), key=lambda r: accuracies[RUNS.index(r)]
    )
    return doubts(best, RUNS, results | {"dense": result_of(other, **facts)})


def test_the_choices_of_a_comparison():
    # As `rand` at ratio 0.01 of LeNet on Fashion-MNIST, where the best of all runs has 0.8968.
    assert doubts_of([0.1792, 0.1578, 0.1695, 0.1767, 0.1]) == [AT_CHANCE, AT_EDGE]
    assert doubts_of([0.767, 0.8073, 0.8458, 0.8597, 0.8703]) == [AT_EDGE]
    assert doubts_of([0.4878, 0.4722, 0.5135, None, None]) == []


def test_noise_is_three_errors_of_a_share():
    noise = 3 * sqrt(0.1 * 0.9 / 100)
    assert doubts_of([0.09, 0.1 + noise - 1e-9, 0.05, 0.1, 0.1], 0.2, num_samples=100) == [
        AT_CHANCE
    ]
    assert doubts_of([0.09, 0.1 + noise + 1e-9, 0.05, 0.1, 0.1], 0.2, num_samples=100) == []


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.integers(1, 10_000))
def test_naming_the_most_frequent_class_is_chance_level(chance, other, num_samples):
    facts = {"chance": chance, "num_samples": num_samples}
    assert doubts_of([0.0, chance, 0.0, 0.0, 0.0], other, **facts) == [AT_CHANCE]


def test_results_without_classes_are_asked_for_edges_alone():
    bits = {"name": "val/bpb", "mode": "min", "unit": "bits per byte"}
    result = {"primary": bits, "metrics": {"val/bpb": 2.0}, "chance": None}
    assert doubts(RUNS[0], RUNS, {RUNS[0].name: result}) == [AT_EDGE]
    assert doubts(RUNS[1], RUNS, {RUNS[1].name: result}) == []
    assert doubts(RUNS[0], RUNS[:1], {RUNS[0].name: result}) == []
    old = {"metrics": {"val/acc": 0.1}}
    assert doubts(RUNS[1], RUNS, {RUNS[1].name: old}) == []
    assert doubts(RUNS[0], RUNS, {}) == []  # all failed
