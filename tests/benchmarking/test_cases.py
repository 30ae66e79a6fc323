import pytest

from memfold.benchmarking.cases import Case, StrategySpec, parse_strategies, with_dense
from memfold.benchmarking.presets import PRESETS
from memfold.benchmarking.workloads import WORKLOADS
from memfold.compression import Strategy
from memfold.errors import InputError


def case(**fields):
    return Case(**{"model": "mlp_tiny", "batch_size": 4, "threads": 1, **fields})


def test_strategies_are_a_list_of_names_with_options():
    text = 'dense, stable_rps:sign=weight+initial_scale=1e+3,low_rank:exclude=["0","2"]+bits=8'
    assert parse_strategies(text) == [
        StrategySpec("dense"),
        StrategySpec("stable_rps", {"sign": "weight", "initial_scale": 1000.0}),
        StrategySpec("low_rank", {"exclude": ["0", "2"], "bits": 8}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "compression=nothing is unknown"),
        ("stable_rps:colour=red", "colour is not an option of stable_rps"),
        ("stable_rps:sign", "options are written name:key=value"),
        ("stable_rps:ratio=0.1", "ratios are given by --ratios"),
        ("stable_rps:sign=red", "sign must be column, run or weight"),
    ],
)
def test_wrong_strategies_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_strategies(text)


def test_names_say_what_a_case_is():
    options = {"sign": "weight", "bits": 8}
    shared = case(strategy="stable_rps", ratio=0.01, options=options, construction="meta")
    assert shared.name == "stable_rps 0.01 sign=weight bits=8 from meta"
    assert shared.variant == "stable_rps sign=weight bits=8 from meta"
    assert shared.dense().name == "dense"
    assert shared.group == shared.dense().group
    assert shared.group == "mlp_tiny, batch 4, sgd, float32, eager, cpu, 1 threads"


def test_each_group_is_led_by_one_dense_case():
    shared = case(strategy="stable_rps", ratio=0.1)
    adamw = case(strategy="stable_rps", ratio=0.1, optimizer="adamw")
    groups = with_dense([shared, shared.dense(), shared, adamw])
    assert list(groups.values()) == [[shared.dense(), shared], [adamw.dense(), adamw]]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_of_models_and_options_that_exist(preset):
    for found in preset.cases("cpu", 1):
        assert found.model in WORKLOADS
        Strategy.from_dict({"name": found.strategy, "ratio": found.ratio, **found.options})
        assert Case(**found.to_dict()) == found
