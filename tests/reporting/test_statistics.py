import math
import statistics
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from memfold.reporting.records import Curve, Run, Setting
from memfold.reporting.statistics import (
    AXES,
    Duel,
    Point,
    at_best_bits,
    best,
    common_request,
    has_collapsed,
    is_tie,
    mean_curve,
    near,
    pareto_front,
    points,
    win_matrix,
)
from memfold.runs.primary import Primary

SETTING = Setting("digits", "mlp")
BPB = Primary("val/bpb", "min", "bits per byte")
LANGUAGE = Setting("shakespeare", "gpt", BPB)
BYTES = AXES["stored_bytes"]


def run(method="stable_rps", ratio=0.1, seed=1, accuracy=0.8, **changes):
    values = {
        "folder": f"{method}-{ratio}-{seed}",
        "setting": SETTING,
        "strategy": method.partition(" ")[0],
        "method": method,
        "seed": seed,
        "ratio": 1.0 if method == "dense" else ratio * 1.001,
        "requested_ratio": None if method == "dense" else ratio,
        "bits": 32,
        "test": accuracy,
        "val": None,
        "stored_bytes": 1_000_000 if method == "dense" else round(1_000_000 * ratio),
        "dense_bytes": 1_000_000,
        "train_state_bytes": None,
        "peak_bytes": None,
        "fit_seconds": None,
        "step_seconds": None,
        "epochs": None,
    }
    return Run(**{**values, **changes})


def seeds(*accuracies, **changes):
    return [run(seed=seed, accuracy=a, **changes) for seed, a in enumerate(accuracies, start=1)]


def point(x, y, setting=SETTING, method="stable_rps"):
    return Point(setting, method, method, 32, 0.1, None, x, None, y, None, (run(),))


def beats(one, other):
    return (
        one.setting == other.setting
        and one.x <= 1.01 * other.x
        and one.y >= other.y
        and (one.x < other.x or one.y > other.y)
    )


# Few values, so that x, y and both coincide often.
places = st.builds(
    point,
    st.sampled_from([1, 1.005, 1.0075, 2, 2.03]),
    st.integers(1, 5).map(lambda n: n / 5),
    st.sampled_from([SETTING, Setting("digits", "cnn")]),
    st.sampled_from(["stable_rps", "mag"]),
)


@given(st.lists(places, max_size=12))
def test_the_front_is_what_no_point_beats(found):
    front = pareto_front(found)
    expected = [p for p in found if not any(beats(q, p) for q in found)]
    assert sorted(map(id, front)) == sorted(map(id, expected))
    assert [p.x for p in front] == sorted(p.x for p in front)


@given(st.lists(places, max_size=12))
def test_best_bits_are_the_front_of_each_method(found):
    expected = [p for p in found if not any(q.method == p.method and beats(q, p) for q in found)]
    assert sorted(map(id, at_best_bits(found))) == sorted(map(id, expected))


def mirrored(found):
    """The same points, where less is better."""
    return [replace(p, setting=replace(p.setting, primary=BPB), y=2 - p.y) for p in found]


@given(st.lists(places, min_size=1, max_size=12))
def test_where_less_is_better_the_same_points_win(found):
    low = mirrored(found)
    assert mirrored(pareto_front(found)) == pareto_front(low)
    assert mirrored(at_best_bits(found)) == at_best_bits(low)
    assert mirrored([best(found)]) == [best(low)]


def test_who_wins_goes_by_the_direction():
    values = {"a": (2.4, 2.41), "b": (2.6, 2.61), "c": (2.605, 2.606)}
    runs = [
        r for method, own in values.items() for r in seeds(*own, method=method, setting=LANGUAGE)
    ]
    (matrix,) = win_matrix(runs)
    assert [p.method for p in matrix.cells[0].points] == ["a", "b", "c"]
    assert matrix.cells[0].winners == ("a",)
    assert matrix.duels["a", "b"] == Duel(wins=1, ties=0, losses=0)
    assert matrix.duels["b", "c"] == Duel(wins=0, ties=1, losses=0)
    assert matrix.duels["c", "a"] == Duel(wins=0, ties=0, losses=1)


@pytest.mark.parametrize(
    ("setting", "values", "width", "collapsed"),
    [
        (SETTING, (0.9, 0.65), 0.1, False),
        (SETTING, (0.9, 0.64), 0.1, True),
        (LANGUAGE, (2.0, 3.0), 0.4, False),
        (LANGUAGE, (2.0, 3.01), 0.4, True),
        (LANGUAGE, (0.0, 4.0), 0.8, True),
        (LANGUAGE, (0.0,), 0.2, False),
    ],
)
def test_what_is_near_the_best_goes_by_the_scale_of_the_metric(setting, values, width, collapsed):
    found = [point(1, value, setting) for value in values]
    assert best(found).y == values[0]
    assert near(found) == pytest.approx(width)
    assert has_collapsed(found) == collapsed


def test_runs_of_two_metrics_are_never_compared():
    runs = [run("a"), run("b", setting=replace(SETTING, primary=BPB))]
    assert win_matrix(runs) == []
    found = points(runs, BYTES)
    assert len({p.setting for p in found}) == 2
    assert len(pareto_front(found)) == 2


def test_points_average_over_seeds_only():
    runs = seeds(0.8, 0.9, 0.85) + seeds(0.7, ratio=0.01) + seeds(0.6, bits=8)
    runs += seeds(0.5, setting=Setting("digits", "cnn"))
    found = points(runs, AXES["ratio"])
    assert [(p.x, p.setting.backbone, p.bits, len(p.runs)) for p in found] == [
        (0.01, "mlp", 32, 1),
        (0.1, "cnn", 32, 1),
        (0.1, "mlp", 8, 1),
        (0.1, "mlp", 32, 3),
    ]
    assert found[-1].y == pytest.approx(0.85)
    assert found[-1].y_std == pytest.approx(0.05)
    assert found[0].y_std is None


def test_bytes_asked_for_are_a_point_though_ratios_differ():
    runs = [
        run(seed=seed, requested_ratio=None, budget_bytes=5000, ratio=ratio)
        for seed, ratio in ((1, 0.101), (2, 0.112))
    ]
    (found,) = points(runs, AXES["ratio"])
    assert (found.budget_bytes, found.requested_ratio, len(found.runs)) == (5000, None, 2)
    assert found.x == pytest.approx(0.1065 * 1.001)


def test_a_run_without_the_value_is_not_on_the_axis():
    runs = [run(seed=1, peak_bytes=10), run(seed=2)]
    (found,) = points(runs, AXES["peak_bytes"])
    assert [r.seed for r in found.runs] == [1]
    assert points(runs, AXES["fit_seconds"]) == []


def test_operations_are_an_axis_where_runs_differ_on_it():
    alike = [run("dense", operations=1000), run("tied", operations=1005)]
    assert points(alike, AXES["operations"]) == []
    looped = [*alike, run("looped", operations=1100), run("unknown")]
    found = points(looped, AXES["operations"])
    assert [(p.method, p.x) for p in found] == [("dense", 1000), ("tied", 1005), ("looped", 1100)]


def test_trainings_are_an_axis_where_a_method_needs_several():
    once = [run("dense", rounds=1), run("mag", rounds=1)]
    assert points(once, AXES["trainings"]) == []
    found = points([*once, run("ltr", rounds=22), run("older")], AXES["trainings"])
    assert [(p.method, p.x) for p in found] == [("dense", 1), ("mag", 1), ("ltr", 22)]


def test_dense_is_at_ratio_1():
    (found,) = points([run("dense")], AXES["ratio"])
    assert found.x == 1


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
)
def test_a_tie_is_two_standard_errors_of_the_pooled_spread(a, b):
    one, other = ([value / 20 for value in values] for values in (a, b))
    (left,) = points(seeds(*one), BYTES)
    (right,) = points(seeds(*other, method="mag"), BYTES)
    difference = abs(statistics.fmean(one) - statistics.fmean(other))
    if len(one) == len(other) == 1:
        expected = difference < 1e-9
    else:
        around = [value - statistics.fmean(one) for value in one]
        around += [value - statistics.fmean(other) for value in other]
        variance = sum(value**2 for value in around) / (len(around) - 2)
        error = math.sqrt(variance / len(one) + variance / len(other))
        expected = difference <= 2 * error + 1e-9
    assert is_tie(left, right) == expected == is_tie(right, left)


def test_the_matrix_counts_wins_ties_and_losses_over_shared_cells():
    runs = [
        *seeds(0.90, 0.91, method="a"),
        *seeds(0.80, 0.81, method="b"),
        *seeds(0.805, 0.806, method="c"),
        *seeds(0.50, 0.51, method="a", ratio=0.01),
        *seeds(0.60, 0.61, method="b", ratio=0.01),
        *seeds(0.40, method="a", ratio=0.001),  # nobody to compare with
        *seeds(0.99, method="dense"),
    ]
    (matrix,) = win_matrix(runs)
    assert (matrix.bits, matrix.methods) == (32, ("a", "b", "c"))
    assert [cell.requested_ratio for cell in matrix.cells] == [0.1, 0.01]
    assert [cell.winners for cell in matrix.cells] == [("a",), ("b",)]
    assert matrix.duels["a", "b"] == Duel(wins=1, ties=0, losses=1)
    assert matrix.duels["b", "a"] == Duel(wins=1, ties=0, losses=1)
    assert matrix.duels["b", "c"] == Duel(wins=0, ties=1, losses=0)
    assert matrix.duels["c", "a"] == Duel(wins=0, ties=0, losses=1)
    assert ("a", "dense") not in matrix.duels


def test_who_ties_with_the_best_wins_too():
    runs = [*seeds(0.90, 0.92, method="a"), *seeds(0.89, 0.92, method="b")]
    (matrix,) = win_matrix(runs)
    assert matrix.cells[0].winners == ("a", "b")
    assert not matrix.cells[0].is_one_seed


def test_what_pairs_of_seeds_tell_apart_does_not_tie():
    # The seeds differ more than the methods do, but always in the same way.
    runs = [*seeds(0.80, 0.85, 0.90, 0.95, method="a")]
    runs += seeds(0.790, 0.841, 0.889, 0.941, method="b")
    runs += seeds(0.70, 0.95, 0.80, 0.90, method="c")
    (matrix,) = win_matrix(runs)
    (cell,) = matrix.cells
    a, b, _ = cell.points
    assert is_tie(a, b)
    assert (cell.winners, cell.separated) == (("a", "c"), ("b",))
    assert astuple(matrix.duels["a", "b"]) == (1, 0, 0)
    assert astuple(matrix.duels["c", "b"]) == (0, 1, 0)
    of_b, of_c = (
        stats.ttest_rel([run.test for run in a.runs], [run.test for run in point.runs]).pvalue
        for point in cell.points[1:]
    )
    assert cell.p_values == (None, pytest.approx(2 * of_b), pytest.approx(of_c))


def test_with_three_seeds_a_difference_may_be_neither_a_tie_nor_told_apart():
    runs = [*seeds(0.80, 0.82, 0.84, method="a"), *seeds(0.70, 0.79, 0.78, method="b")]
    (matrix,) = win_matrix(runs)
    assert matrix.cells[0].winners == ("a",)
    assert matrix.cells[0].separated == ()
    assert matrix.cells[0].points[0].y_half == pytest.approx(4.302653 * 0.02 / math.sqrt(3))


def test_with_one_seed_each_only_equal_accuracies_tie_and_the_cell_says_so():
    runs = [run("a", accuracy=0.9), run("b", accuracy=0.9), run("c", accuracy=0.8999)]
    (matrix,) = win_matrix(runs)
    assert matrix.cells[0].winners == ("a", "b")
    assert matrix.cells[0].is_one_seed


def test_settings_bits_and_requests_are_never_compared_with_each_other():
    runs = [run("a"), run("b", bits=8), run("c", setting=Setting("mnist", "mlp"))]
    runs += [run("d", requested_ratio=None, budget_bytes=100_000)]
    assert win_matrix(runs) == []
    runs += [run("e", requested_ratio=None, budget_bytes=100_000)]
    (matrix,) = win_matrix(runs)
    assert [(c.requested_ratio, c.budget_bytes) for c in matrix.cells] == [(None, 100_000)]


@pytest.mark.parametrize(("found", "asked"), [(0.109, "0.1"), (0.091, "0.1"), (0.28, "~0.28")])
def test_a_ratio_that_was_not_come_near_is_compared_with_none(found, asked):
    runs = [run("synflow", 0.1), replace(run("tied", 0.1), ratio=found)]
    assert runs[1].asked == asked
    (tied,) = (point for point in points(runs, AXES["ratio"]) if point.method == "tied")
    is_near = asked == "0.1"
    assert (tied.x, tied.requested_ratio) == ((0.1, 0.1) if is_near else (found, None))
    assert len(win_matrix(runs)) == is_near


def test_the_common_request_is_in_the_middle_of_those_that_most_methods_have():
    runs = [run(m, ratio=r) for m in "ab" for r in (0.3, 0.1, 0.01)] + [run("a", ratio=0.001)]
    assert common_request([*runs, run("dense")]) == ("ratio", 0.1)
    assert common_request([run("dense")]) is None


def test_a_mean_curve_goes_as_far_as_all_seeds():
    runs = [
        run(curves={"val/acc": Curve((1, 2, 3, 4), (0.1, 0.2, 0.3, 0.9))}),
        run(curves={"val/acc": Curve((1, 3), (0.3, 0.5))}),
        run(),
    ]
    curve = mean_curve(runs, "val/acc")
    assert curve is not None
    assert curve.steps == (1, 2, 3)
    assert curve.values == pytest.approx((0.2, 0.3, 0.4))
    assert mean_curve(runs, "train/loss") is None
    apart = run(curves={"val/acc": Curve((7, 8), (0.1, 0.2))})
    assert mean_curve([*runs, apart], "val/acc") is None
