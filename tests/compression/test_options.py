"""What users get wrong, each answered in one line; the model stays as it was."""

import copy
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import memfold
from memfold.compression import Strategy, compression_of
from memfold.errors import InputError
from memfold.strategies import strategy_class
from strategies.cases import STRATEGIES, options_of

ROOT = Path(__file__).parents[2]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


BAD = [
    ("stable_rps", {"ratio": 0}, "ratio must be a number in (0, 1] or null, got 0"),
    ("stable_rps", {"ratio": -0.1}, "ratio must be a number in (0, 1] or null, got -0.1"),
    ("stable_rps", {"ratio": 1.5}, "ratio must be a number in (0, 1] or null, got 1.5"),
    ("stable_rps", {"ratio": float("nan")}, "ratio must be a number in (0, 1] or null, got nan"),
    ("stable_rps", {"ratio": "small"}, "ratio must be a number in (0, 1] or null, got 'small'"),
    ("stable_rps", {"ratio": True}, "ratio must be a number in (0, 1] or null, got True"),
    ("stable_rps", {"ratio": 0.1, "budget_bytes": 999}, "are both given"),
    (
        "stable_rps",
        {"budget_bytes": 0},
        "budget_bytes must be a whole number of at least 1",
    ),
    ("stable_rps", {"seed": 0.5}, "seed must be a whole number, got 0.5"),
    ("stable_rps", {"min_size": -1}, "compression.min_size must be"),
    ("stable_rps", {"min_size": 10**6}, "leave nothing to compress"),
    ("stable_rps", {"include": "fc"}, "compression.include must be a list"),
    ("stable_rps", {"include": ["fc*"]}, "'fc*' matches no compressible weight"),
    ("stable_rps", {"exclude": ["*"]}, "leave nothing to compress"),
    ("stable_rps", {"sign": "both"}, "compression.sign must be column, run or weight, got 'both'"),
    ("stable_rps", {"gradient_scale": "v5"}, "must be length, projection or none, got 'v5'"),
    (
        "stable_rps",
        {"initial_scale": 0},
        "initial_scale must be a number above 0 or null",
    ),
    (
        "stable_rps",
        {"initial_scale": float("inf")},
        "initial_scale must be a number above 0 or null",
    ),
    ("stable_rps", {"tile_rows": 3}, "compression.tile_rows is not an option of stable_rps"),
    ("stable_rps", {"tile_rows": None}, "compression.tile_rows is not an option of stable_rps"),
    ("stable_rps", {"sign": None}, "compression.sign must be column, run or weight, got None"),
    ("roast", {"tile_rows": 0}, "compression.tile_rows must be a whole number of at least 1"),
    ("roast", {"ratio": 0.5}, "fewer than one tile of 16 x 16"),
    ("hashednet", {"ratio": 0.005}, "one value per tensor"),
    (
        "stabel_rps",
        {},
        f"compression=stabel_rps is unknown; strategies: {', '.join(memfold.strategies())}",
    ),
]


@pytest.mark.parametrize(("strategy", "options", "message"), BAD)
def test_bad_options(strategy, options, message):
    net = model()
    before = repr(net), {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        memfold.compress(net, strategy, **options)
    assert "\n" not in str(caught.value)
    assert repr(net) == before[0]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before[1].items())
    assert net.state_dict().keys() == before[1].keys()


def lazy_model():
    return nn.Sequential(nn.LazyLinear(4))


def mixed_model():
    net = model()
    net[2].to(torch.bfloat16)
    return net


def compressed_model():
    return memfold.compress(model(), "stable_rps", ratio=0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "has no compressible weights"),
        (lambda: model().requires_grad_(False), "has no compressible weights"),
        (lazy_model, "lazy parameter"),
        (mixed_model, "several dtypes (torch.bfloat16, torch.float32)"),
        (lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), "max_norm=1.0"),
        (lambda: torch.jit.script(model()), "compiled code"),
        (compressed_model, "compressed already"),
        (lambda: nn.Sequential(compressed_model()), "compressed already: its part '0'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_models_that_cannot_be_shared(build, message):
    with pytest.raises(InputError, match=re.escape(message)):
        memfold.compress(build(), "stable_rps", ratio=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("strategy", memfold.strategies())
def test_initial_weights_are_finite(strategy, value):
    net = model()
    with torch.no_grad():
        net[2].weight[0, 0] = value
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=r"2\.weight has initial weights that are not finite"):
        memfold.compress(net, strategy, **options_of(strategy))
    assert compression_of(net) is None
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_an_exclude_pattern_without_a_match_is_said():
    with pytest.warns(UserWarning, match="compression.exclude='head' matches no"):
        memfold.compress(model(), "stable_rps", ratio=0.5, exclude=["head"])


@pytest.mark.parametrize("asked", [{"ratio": 0.1}, {"budget_bytes": 300}])
def test_dense_says_that_it_ignores_what_is_asked_for(asked):
    [(key, value)] = asked.items()
    with pytest.warns(UserWarning, match=f"dense ignores {key}={value}: it has one ratio"):
        net = memfold.compress(model(), "dense", **asked)
    assert compression_of(net).strategy == strategy_class("dense")()


@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        ("mag", {}, 0.1),
        ("mag", {"ratio": 0.02}, 0.02),
        ("mag", {"budget_bytes": 300}, None),
        ("supermask", {}, 0.5),
        ("dense", {}, None),
    ],
)
def test_who_gives_no_ratio_asks_for_the_default(name, options, asked):
    assert strategy_class(name)(**options).requested_ratio == asked


def test_dense_has_nothing_to_say_where_nothing_is_ignored():
    old = Strategy.from_dict({"name": "dense", "ratio": 0.1})  # as older artifacts have it
    assert (old, old.ratio) == (strategy_class("dense")(), None)
    memfold.compress(model(), "dense", ratio=1)


def test_patterns_and_sizes_choose_tensors():
    net = memfold.compress(model(), "stable_rps", ratio=0.5, exclude=["2"])
    assert memfold.footprint(net).num_weights == 8 * 16
    net = memfold.compress(model(), "stable_rps", ratio=0.5, include=["2.*"])
    assert memfold.footprint(net).num_weights == 16 * 4
    net = memfold.compress(model(), "stable_rps", ratio=0.5, min_size=100)
    assert memfold.footprint(net).num_weights == 8 * 16


@pytest.mark.parametrize("name", memfold.strategies())
def test_every_strategy_has_its_files_and_they_agree(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = compose("train", [f"compression={name}"]).compression
    cls = strategy_class(name)
    plain = OmegaConf.to_container(options, resolve=False)
    assert plain.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    assert list(plain) == [field.name for field in fields(cls)]
    top_level = {key: plain.pop(key) for key in ("ratio", "budget_bytes", "seed")}
    assert top_level == {key: f"${{{key}}}" for key in top_level}
    of_the_file = ("bits", "train_bits", "train_bits_from", "block_size", "coding")
    for key in (*of_the_file, "untouched_bits", "merge_norms"):
        assert plain.pop(key) == f"${{artifact.{key}}}"
    assert Strategy.from_dict({"name": name, **plain}) == cls()
    assert cls.__module__.rsplit(".", 1)[1] == name
    assert name in STRATEGIES
    assert (ROOT / "docs" / "strategies" / f"{name}.md").is_file()


def test_only_strategies_get_the_ratio_and_the_bits_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("def net(width, *, ratio=4, bits=2, seed=0): ...\n")
    (tmp_path / "net.yaml").write_text("defaults: [/options_of/own_net.net@_here_]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        options = OmegaConf.to_container(compose("net"), resolve=False)
    assert options == {"_target_": "own_net.net", "ratio": 4, "bits": 2, "seed": "${seed}"}


def test_strategies_are_only_imported_for_their_own_configurations(tmp_path):
    (tmp_path / "other.yaml").write_text("lr: 1")
    code = (
        "import sys\nfrom hydra import compose, initialize_config_dir\n"
        "with initialize_config_dir(sys.argv[1], version_base='1.3'):\n    compose('other')\n"
        "print('hydra_plugins.memfold' in sys.modules, 'memfold' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("name", memfold.strategies())
def test_strategies_survive_the_way_through_plain_data(name):
    options = options_of(name, ratio=0.5)
    strategy = strategy_class(name)(seed=3, exclude=("head",), **options)
    assert Strategy.from_dict(strategy.to_dict()) == strategy
