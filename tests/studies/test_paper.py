"""The commands of a comparison, and what no comparison can be made of."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from memfold.errors import InputError
from memfold.studies.paper import EXPERIMENTS, METHODS, RATIOS, RECORD, SEEDS, Grid
from memfold.studies.sweep_arguments import expand_sweep_arguments
from studies.sweeps import write_plan
from training.jobs import compose_job

OUT = Path("out")
SMALL = Grid(
    experiments=("cifar10_vgg11",), methods=("snip", "dense"), ratios=(0.1, 0.01), seeds=(1, 2)
)


def test_dense_has_a_sweep_without_ratios() -> None:
    dense, compressed = SMALL.sweeps(OUT)
    assert dense.folder == OUT / "cifar10_vgg11" / "dense"
    assert dense.arguments(1) == [
        "-m",
        "experiment=cifar10_vgg11",
        "compression=dense",
        "seed=1,2",
        "logger=csv",
        "hydra.sweep.dir=out/cifar10_vgg11/dense",
    ]
    assert compressed.arguments(6) == [
        "-m",
        "experiment=cifar10_vgg11",
        "compression=snip",
        "ratio=0.1,0.01",
        "seed=1,2",
        "logger=csv",
        "hydra.launcher.n_jobs=6",
        "hydra.sweep.dir=out/cifar10_vgg11/compressed",
    ]
    assert (dense.num_runs, compressed.num_runs) == (2, 4)


def test_a_kind_that_is_not_wanted_has_no_sweep() -> None:
    only_dense = Grid(experiments=EXPERIMENTS[:2], methods=("dense",)).sweeps(OUT)
    assert [sweep.folder.name for sweep in only_dense] == ["dense", "dense"]
    no_dense = Grid(experiments=EXPERIMENTS[:1], methods=("mag", "ltr")).sweeps(OUT)
    assert [sweep.folder.name for sweep in no_dense] == ["compressed"]


def test_by_default_it_is_the_whole_comparison() -> None:
    sweeps = Grid().sweeps(OUT)
    assert len(sweeps) == 2 * len(EXPERIMENTS)
    per_experiment = len(SEEDS) * (1 + (len(METHODS) - 1) * len(RATIOS))
    assert sum(sweep.num_runs for sweep in sweeps) == per_experiment * len(EXPERIMENTS)


def test_fewer_epochs_drop_the_rate_at_the_same_parts(tmp_path: Path) -> None:
    [sweep] = Grid(experiments=("cifar100_vgg11",), methods=("dense",), epochs=40).sweeps(OUT)
    given = [text for text in sweep.overrides if not text.startswith("seed=")]
    cfg = compose_job(tmp_path, *given)
    assert (cfg.trainer.max_epochs, cfg.scheduler.milestones) == (40, None)  # 50 and 75 %
    assert Grid(epochs=40).describe_schedule() == "40 epochs instead of 160 (drops after 20 and 30)"
    assert Grid().describe_schedule() == "160 epochs"


def test_further_overrides_are_passed_on() -> None:
    grid = Grid(overrides=("logger=wandb", "data.root=/a", "~callbacks.progress_bar"))
    for sweep in grid.sweeps(OUT):
        assert sweep.overrides[-3:] == grid.overrides
        assert "logger=csv" not in sweep.overrides


@pytest.mark.parametrize("name", ["with space", "a,b", "a=b", "it's", "${x}"])
def test_any_folder_can_be_named(name: str, tmp_path: Path) -> None:
    [sweep] = Grid(experiments=("cifar10_vgg11",), methods=("dense",)).sweeps(tmp_path / name)
    place = sweep.arguments(1)[-1]
    [override] = OverridesParser.create().parse_overrides([place])
    assert override.key_or_group == "hydra.sweep.dir"
    assert str(override.value()).replace("\\${", "${") == str(sweep.folder)


def test_a_sweep_that_was_started_is_resumed_with_its_overrides(tmp_path: Path) -> None:
    sweep, _ = SMALL.sweeps(tmp_path)
    sweep.folder.mkdir(parents=True)
    started = sweep.arguments(2)
    write_plan(sweep.folder, [*started[:-1]], ["seed=1"])
    again = sweep.arguments(3)
    assert again[-1] == f"sweep.resume={sweep.folder}"
    expanded = expand_sweep_arguments(again)  # what train.py makes of it
    assert {*sweep.overrides, "hydra.launcher.n_jobs=3"} <= set(expanded)
    assert "hydra.launcher.n_jobs=2" not in expanded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experiments": ("cifar10",)}, "--experiments cifar10 is unknown; available: cifar10_res"),
        ({"methods": ("dens",)}, "--methods dens is unknown; available: basis, "),
        ({"methods": ()}, "--methods needs at least one value"),
        ({"ratios": (0.0,)}, "--ratios 0: a ratio is above 0 and at most 1"),
        ({"ratios": (float("nan"),)}, "--ratios nan: a ratio is above 0 and at most 1"),
        ({"ratios": (0.1, 0.1)}, "--ratios 0.1,0.1: a value is given twice"),
        ({"seeds": (-1,)}, "--seeds -1: a seed is a whole number of at least 0"),
        ({"overrides": ("--cfg",)}, "--cfg: after -- only overrides of train.py"),
        ({"overrides": ("ratio=0.1",)}, "ratio=0.1: use --ratios instead"),
        ({"overrides": ("resume=x",)}, "resume=x: use --out instead"),
        ({"overrides": ("hydra/launcher=basic",)}, "hydra/launcher=basic: folders and launcher"),
        ({"overrides": ("optimizer.lr=0.1,0.2",)}, "optimizer.lr=0.1,0.2: an override after --"),
        ({"overrides": ("data.root=[",)}, "data.root=[: "),
    ],
)
def test_wrong_values_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        Grid(**options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_folder_keeps_its_comparison(tmp_path: Path) -> None:
    SMALL.admit(tmp_path).write(tmp_path / RECORD)  # nothing is there yet
    facts = {name: getattr(SMALL, name) for name in ("methods", "ratios", "seeds")}
    Grid(experiments=EXPERIMENTS, **facts).admit(tmp_path)
    for changed, words in (
        ({"seeds": (1, 2, 3)}, "was started with --seeds 1,2, but --seeds 1,2,3 is given now"),
        ({"epochs": 3}, "was started with --epochs 160, but --epochs 3 is given now"),
        ({"overrides": ("logger=csv",)}, "was started without --, but -- logger=csv is given now"),
    ):
        with pytest.raises(InputError, match="choose another --out") as error:
            Grid(**{**facts, **changed}).admit(tmp_path)
        assert words in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"--seeds": "1"}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "reproduction.json").write_text(text)
    with pytest.raises(InputError, match=r"reproduction\.json is damaged"):
        SMALL.admit(tmp_path)
