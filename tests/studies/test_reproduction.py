"""`scripts/reproduce.py`: what it starts, how it ends, how it goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.writers import write_cifar10
from memfold.runs.locks import locked
from studies.stand_in_repository import let, load_script, reports, write_repository
from studies.sweeps import processes_of, statuses, wait_until
from training.jobs import REPOSITORY, compose_job

Run = Callable[..., tuple[int, str, str]]
script = load_script()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_repository(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "out" / "cifar10_vgg11" / "runs"


@pytest.fixture
def reproduce(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call it for one experiment, two methods and one seed, one run at a time."""

    def call(*arguments: str) -> tuple[int, str, str]:
        base = ["--out", str(tmp_path / "out"), "--experiments", "cifar10_vgg11"]
        cells = ["--methods", "dense,stable_rps", "--ratios", "0.1", "--seeds", "1"]
        own, _, further = " ".join(arguments).partition(" -- ")
        given = [*base, *cells, "--jobs-per-device", "1", "--epochs", "4", *own.split()]
        given += ["--", "trainer=cpu", "data=digits", "optimizer.lr=0.1"]
        capfd.readouterr()
        status = script.main([*given, *further.split()], root)
        return status, *capfd.readouterr()

    return call


def test_all_runs_and_the_report_are_made(
    reproduce: Run, root: Path, runs: Path, tmp_path: Path
) -> None:
    status, out, err = reproduce()
    assert (status, err) == (0, "")
    assert "runs: 2, 1 at once, 4 epochs instead of 160 (drops after 2 and 3) each" in out
    assert "[2/2] stable_rps-0.1-s1: val/acc 0.9010 " in out
    dense, compressed = (
        json.loads((runs / f"{name}.overrides.json").read_text())
        for name in ("dense-s1", "stable_rps-0.1-s1")
    )
    assert "compression=dense" in dense
    assert "ratio=0.1" not in dense
    wanted = {"compression=stable_rps", "ratio=0.1", "trainer.max_epochs=4", "logger=csv"}
    assert wanted <= set(compressed)
    [report] = reports(root)
    assert report[:2] == [str(runs), f"--out={tmp_path}/out/report"]
    [reference] = [text for text in report if text.startswith("--reference=")]
    assert reference.endswith("/results/published/synflow_cifar10_vgg11.csv")
    assert "4 epochs instead of 160" in report[-1]


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    reproduce: Run, root: Path, runs: Path, tmp_path: Path
) -> None:
    status, out, err = reproduce("--dry-run")
    assert (status, err) == (0, "")
    dense, compressed, report = map(shlex.split, out.splitlines())
    train = os.path.relpath(root / "train.py")
    assert dense[:3] == ["python", train, "experiment=cifar10_vgg11"]
    assert compressed[-4:] == [
        *("compression=stable_rps", "ratio=0.1", "seed=1"),
        f"hydra.run.dir={runs}/stable_rps-0.1-s1",
    ]
    assert any(text.startswith("--reference=") for text in report)
    assert not (tmp_path / "out").exists()


def test_by_default_it_is_the_whole_comparison() -> None:
    options = script.parser().parse_args(["--out", "out"])
    plans = {name: script.plan_of(name, options, ["logger=wandb"]) for name in options.experiments}
    assert tuple(plans) == script.EXPERIMENTS
    config = OmegaConf.create({"logger": {"group": None, "job_type": None}})
    methods = {name: dict.fromkeys(plan.methods, config) for name, plan in plans.items()}
    found = [*script.commands(Path("train.py"), plans, methods, Path("out"))]
    per_experiment = len(script.SEEDS) * (1 + (len(script.METHODS) - 1) * len(script.RATIOS))
    assert len(found) == per_experiment * len(script.EXPERIMENTS) == 615
    assert len({command[-1] for command in found}) == 615
    assert not any("logger=csv" in command for command in found)


def test_fewer_epochs_drop_the_rate_at_the_same_parts(tmp_path: Path) -> None:
    options = script.parser().parse_args(["--out", "out", "--epochs", "40"])
    plan = script.plan_of("cifar100_vgg11", options, [])
    cfg = compose_job(tmp_path, *plan.overrides)
    assert (cfg.trainer.max_epochs, cfg.scheduler.milestones) == (40, None)  # 50 and 75 %
    assert script.schedule(40) == "40 epochs instead of 160 (drops after 20 and 30)"
    assert script.schedule(160) == "160 epochs"


def test_a_report_is_made_after_failures_too_and_what_failed_is_tried_again(
    reproduce: Run, root: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_LARGEST_LR", "0.01")
    status, _, err = reproduce()
    assert status == 1
    assert len(reports(root)) == 1
    [line] = err.splitlines()
    assert line.startswith("error: 2 runs failed, the last: cifar10_vgg11/stable_rps-0.1-s1: the ")
    assert "--seeds 1" in line
    monkeypatch.delenv("STAND_IN_LARGEST_LR")
    let(root, "fail")
    assert reproduce()[0] == 1
    assert set(statuses(runs).values()) == {"completed"}
    let(root, "")
    status, out, _ = reproduce()
    assert status == 0
    assert "[1/2] dense-s1: val/acc 0.9010 (0 s)" in out


def test_experiments_of_earlier_calls_are_drawn_too(reproduce: Run, root: Path, runs: Path) -> None:
    runs.mkdir(parents=True)
    assert reproduce("--experiments", "cifar10_resnet20")[0] == 0
    [report] = reports(root)
    drawn = [Path(text).parent.name for text in report if not text.startswith("--")]
    assert drawn == ["cifar10_resnet20", "cifar10_vgg11"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_and_it_says_how_to_go_on(name: str, reproduce: Run, root: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    let(root, f"interrupt {name}")
    status, _, err = reproduce("--epochs", "7")
    assert status == 128 + getattr(signal, name)
    [line] = err.splitlines()
    assert line.startswith("error: stopped; go on with: python ")
    assert "--epochs 7" in line
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dens"), "error: methods.dens: compression=dens is unknown; available: "),
        (("--experiments", "x"), "error: overrides: experiment=x is unknown; available: "),
        (("--ratios", "0"), "error: ratios.0 must be above 0, got 0.0"),
        (("--ratios", "nan"), "error: ratios.0 must be "),
        (("--ratios", "0.1,0.1"), "error: ratios: 0.1 is there twice"),
        (("--seeds", "-1"), "error: seeds.0 must be at least 0, got -1"),
        ((" -- ", "seed=2"), "error: overrides: seed cannot be set there"),
        ((" -- ", "resume=x"), "error: overrides: resume cannot be set there"),
        ((" -- ", "trainer.max_epochs=2"), "error: trainer.max_epochs=2: use --epochs instead"),
        ((" -- ", "fantasy.lr=3"), "error: overrides: fantasy is no key of the configuration"),
        ((" -- ", "data.root=["), "error: overrides: "),
        ((" -- ", "--cfg"), "error: overrides: "),
        ((" -- ", "optimizer.momentum=0.1,0.2"), "error: overrides: "),
        (
            (" -- ", "optimizer=sgdd"),
            "error: overrides: optimizer=sgdd is unknown; available: adamw, muon, sgd",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], message: str, reproduce: Run, tmp_path: Path
) -> None:
    status, out, err = reproduce(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "text"),
    [("--ratios", "x"), ("--seeds", "1.5"), ("--epochs", "0"), ("--jobs-per-device", "none")],
)
def test_what_is_no_number_is_refused_by_the_parser(
    option: str, text: str, reproduce: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        reproduce(option, text)
    assert f"error: argument {option}: " in capfd.readouterr().err


def test_runs_of_another_grid_wait_for_it(reproduce: Run, runs: Path) -> None:
    assert reproduce()[0] == 0
    before = (runs / "dense-s1" / "result.json").read_bytes()
    status, out, _ = reproduce("--seeds", "2")
    assert status == 0
    aside = runs.with_name("other_runs")
    assert f"not of this grid, kept in {aside}: dense-s1, stable_rps-0.1-s1" in out
    assert sorted(statuses(runs)) == ["dense-s2", "stable_rps-0.1-s2"]
    assert reproduce("--seeds", "1,2")[0] == 0
    assert (runs / "dense-s1" / "result.json").read_bytes() == before
    assert len(statuses(runs)) == 4


def test_missing_data_is_named_before_anything_runs(reproduce: Run, tmp_path: Path) -> None:
    status, _, err = reproduce(f" -- data=cifar10 data.root={tmp_path} data.download=false")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: data.root={tmp_path}: no cifar-10-binary.tar.gz in ")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_run(reproduce: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(runs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "prepare_data", interrupt)
    status, _, err = reproduce()
    assert status == 130
    assert err.startswith("error: stopped; go on with: python ")


def test_a_folder_that_cannot_be_made_is_named(reproduce: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    status, _, err = reproduce()
    assert status == 1
    assert err.startswith(f"error: cannot write {tmp_path}/out")
    assert err.count("\n") == 1


def test_two_at_once_in_one_folder_are_refused(reproduce: Run, root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        status, _, err = reproduce()
    assert status == 1
    assert "is in use by another process" in err
    assert not reports(root)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_it(number: signal.Signals, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys, pathlib; from studies.stand_in_repository import load_script; "
    code += f"sys.exit(load_script().main(sys.argv[1:], pathlib.Path({str(root)!r})))"
    chosen = ("--experiments", "cifar10_vgg11", "--methods", "mag", "--epochs", "9")
    running = subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(out), *chosen, "--", "data=digits"],
        env={**os.environ, "STAND_IN_SECONDS": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: processes_of(out / "cifar10_vgg11"))
    os.killpg(running.pid, number)  # as a terminal does
    _, err = running.communicate(timeout=60)
    wait_until(lambda: not processes_of(out), seconds=30)
    if number == signal.SIGINT:
        assert running.returncode == 130
        assert err.splitlines()[-1].startswith("error: stopped; go on with: ")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_an_interrupted_comparison_is_completed_and_drawn(tmp_path: Path) -> None:
    """A miniature of the whole: real runs, two at once, stopped in the middle."""
    write_cifar10(tmp_path / "data" / "cifar-10-batches-bin", num_records=64)
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(REPOSITORY / "scripts" / "reproduce.py"), "--out", str(out)),
        *("--experiments", "cifar10_vgg11", "--methods", "dense,stable_rps", "--ratios", "0.1"),
        *("--seeds", "1", "--epochs", "1", "--jobs-per-device", "1"),
        *("--", f"data.root={tmp_path / 'data'}", "trainer=cpu"),
        *("data.download=false", "backbone.width=2", "~callbacks.progress_bar"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = out / "cifar10_vgg11" / "runs"
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until((runs / "stable_rps-0.1-s1").exists, seconds=150)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=150)
    assert first.returncode == 130
    assert err.splitlines()[-1].startswith("error: stopped; go on with: python ")
    assert statuses(runs)["dense-s1"] == "completed"
    assert statuses(runs).get("stable_rps-0.1-s1") != "completed"
    assert not (out / "report").exists()
    before = (runs / "dense-s1" / "result.json").read_bytes()
    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert second.returncode == 0, second.stderr
    assert (runs / "dense-s1" / "result.json").read_bytes() == before
    assert set(statuses(runs).values()) == {"completed"}
    report = out / "report"
    lines = [json.loads(line) for line in (report / "runs.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"run"}  # and no problem
    assert sorted(line["strategy"] for line in lines) == ["dense", "stable_rps"]
    assert "86.83" in (report / "table.md").read_text()  # of SynFlow, published, at 0.01
    assert (report / "index.html").exists()
