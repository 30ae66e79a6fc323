"""`scripts/reproduce.py`: what it starts, how it ends, how it goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.writers import write_cifar10
from memfold.runs.locks import locked
from memfold.studies.reproduction import main
from studies.stand_in_repository import calls, let, write_repository
from studies.sweeps import let as let_job
from studies.sweeps import processes_of, statuses, wait_until
from training.jobs import REPOSITORY

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_repository(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def reproduce(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call it for one experiment, two methods and one seed, one run at a time."""

    def call(*arguments: str) -> tuple[int, str, str]:
        base = ["--out", str(tmp_path / "out"), "--experiments", "cifar10_vgg11"]
        cells = ["--methods", "dense,stable_rps", "--ratios", "0.1", "--seeds", "1"]
        own, _, further = " ".join(arguments).partition(" -- ")
        given = [*base, *cells, "--jobs-per-device", "1", *own.split()]
        given += ["--", "trainer=cpu", "data=digits"]
        capfd.readouterr()
        status = main([*given, *further.split()], root)
        return status, *capfd.readouterr()

    return call


def test_all_sweeps_and_the_report_are_run(reproduce: Run, root: Path, tmp_path: Path) -> None:
    status, out, err = reproduce("--epochs", "4")
    assert (status, err) == (0, "")
    assert "runs: 2, 1 at once, 4 epochs instead of 160 (drops after 2 and 3) each" in out
    dense, compressed = calls(root, "train")
    assert "compression=dense" in dense
    assert "ratio=0.1" not in dense
    assert {"compression=stable_rps", "ratio=0.1", "trainer.max_epochs=4"} <= set(compressed)
    assert compressed[-1] == f"hydra.sweep.dir={tmp_path}/out/cifar10_vgg11/compressed"
    [report] = calls(root / "scripts", "report")
    assert report[:2] == [f"{tmp_path}/out/cifar10_vgg11", f"--out={tmp_path}/out/report"]
    [reference] = [text for text in report if text.startswith("--reference=")]
    assert reference.endswith("/results/published/synflow_cifar10_vgg11.csv")
    assert "4 epochs instead of 160" in report[-1]


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    reproduce: Run, root: Path, tmp_path: Path
) -> None:
    status, out, err = reproduce("--dry-run")
    assert (status, err) == (0, "")
    dense, compressed, report = out.splitlines()
    train = os.path.relpath(root / "train.py")
    assert dense.startswith(f"python {train} -m experiment=cifar10_vgg11 compression=dense seed=1")
    assert " compression=stable_rps ratio=0.1 seed=1 " in compressed
    assert " --reference=" in report
    assert not calls(root, "train")
    assert not (tmp_path / "out").exists()


def test_a_report_is_made_after_failures_too(reproduce: Run, root: Path, tmp_path: Path) -> None:
    let(root, "train", "fail")
    status, _, err = reproduce()
    assert status == 1
    assert len(calls(root, "train")) == 2
    assert len(calls(root / "scripts", "report")) == 1
    [line] = err.splitlines()
    assert line.startswith(f"error: not complete: {tmp_path}/out/cifar10_vgg11/dense, ")
    assert "--seeds 1" in line
    let(root, "train", "")
    let(root / "scripts", "report", "fail")
    assert reproduce()[0] == 1


def test_experiments_of_earlier_calls_are_drawn_too(
    reproduce: Run, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "cifar10_vgg11").mkdir(parents=True)
    assert reproduce("--experiments", "cifar10_resnet20")[0] == 0
    [report] = calls(root / "scripts", "report")
    drawn = [Path(text).name for text in report if not text.startswith("--")]
    assert drawn == ["cifar10_resnet20", "cifar10_vgg11"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_and_it_says_how_to_go_on(name: str, reproduce: Run, root: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    let(root, "train", f"interrupt {name}")
    status, _, err = reproduce("--epochs", "7")
    assert status == 128 + getattr(signal, name)
    [line] = err.splitlines()
    assert line.startswith("error: stopped; go on with: python ")
    assert "--epochs 7" in line
    assert len(calls(root, "train")) == 1
    assert not calls(root / "scripts", "report")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "x"), "error: --ratios x: expected numbers, separated by commas"),
        (("--seeds", "1.5"), "error: --seeds 1.5: expected whole numbers, separated by commas"),
        (("--epochs", "0"), "error: --epochs 0: expected a whole number of at least 1"),
        (("--jobs-per-device", "none"), "error: --jobs-per-device none: expected a whole number"),
        (("--methods", "dens"), "error: --methods dens is unknown; available: "),
        ((" -- ", "seed=2"), "error: seed=2: use --seeds instead"),
        ((" -- ", "fantasy.lr=3"), "error: fantasy is no key of the configuration"),
        (
            (" -- ", "optimizer=sgdd"),
            "error: optimizer=sgdd is unknown; available: adamw, muon, sgd",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], message: str, reproduce: Run, root: Path
) -> None:
    status, out, err = reproduce(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not calls(root, "train")


def test_changed_arguments_are_refused_before_anything_runs(reproduce: Run, root: Path) -> None:
    assert reproduce()[0] == 0
    status, _, err = reproduce("--seeds", "1,2")
    assert status == 1
    assert "was started with --seeds 1, but --seeds 1,2 is given now" in err
    assert len(calls(root, "train")) == 2


def test_missing_data_is_named_before_anything_runs(
    reproduce: Run, root: Path, tmp_path: Path
) -> None:
    status, _, err = reproduce(f" -- data=cifar10 data.root={tmp_path} data.download=false")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: data.root={tmp_path}: no cifar-10-binary.tar.gz in ")
    assert not calls(root, "train")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_run(reproduce: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(runs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memfold.studies.reproduction.prepare_data", interrupt)
    status, _, err = reproduce()
    assert status == 130
    assert err.startswith("error: stopped; go on with: python ")


def test_a_folder_that_cannot_be_made_is_named(reproduce: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    status, _, err = reproduce()
    assert status == 1
    assert err.startswith(f"error: {tmp_path}/out")
    assert err.count("\n") == 1


def test_two_at_once_in_one_folder_are_refused(reproduce: Run, root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        status, _, err = reproduce()
    assert status == 1
    assert "is in use by another process" in err
    assert not calls(root, "train")


@pytest.mark.slow
def test_a_failed_run_is_tried_again_by_the_same_command(
    reproduce: Run, tmp_path: Path, root: Path
) -> None:
    write_repository(root, with_sweeps=True)
    sweep = tmp_path / "out" / "cifar10_vgg11" / "compressed"
    let_job(sweep, 1, "fail")
    chosen = ("--methods", "stable_rps", "--seeds", "1,2")
    status, out, _ = reproduce(*chosen)
    assert status == 1
    assert statuses(sweep) == {"0": "completed", "1": "failed"}
    let_job(sweep, 1, "")
    status, out, _ = reproduce(*chosen)
    assert status == 0
    assert "[1/2] 0: seed=1: already completed" in out
    assert statuses(sweep) == {"0": "completed", "1": "completed"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_it(number: signal.Signals, root: Path, tmp_path: Path) -> None:
    write_repository(root, with_sweeps=True)
    out = tmp_path / "out"
    sweep = out / "cifar10_vgg11" / "compressed"
    let_job(sweep, 0, "sleep")
    code = "import sys, pathlib; from memfold.studies.reproduction import main; "
    code += f"sys.exit(main(sys.argv[1:], pathlib.Path({str(root)!r})))"
    chosen = ("--experiments", "cifar10_vgg11", "--methods", "mag", "--jobs-per-device", "2")
    running = subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(out), *chosen, "--", "data=digits"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((sweep / "0" / "sleeps").exists)
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
        *("--seeds", "1", "--epochs", "1", "--", f"data.root={tmp_path / 'data'}", "trainer=cpu"),
        *("data.download=false", "backbone.width=2", "~callbacks.progress_bar"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dense, compressed = (out / "cifar10_vgg11" / name for name in ("dense", "compressed"))
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until((compressed / "sweep.json").exists, seconds=150)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=150)
    assert first.returncode == 130
    assert err.splitlines()[-1].startswith("error: stopped; go on with: python ")
    assert statuses(dense) == {"0": "completed"}
    assert statuses(compressed) != {"0": "completed"}
    assert not (out / "report").exists()
    before = (dense / "0" / "result.json").read_bytes()
    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert second.returncode == 0, second.stderr
    assert (dense / "0" / "result.json").read_bytes() == before
    assert statuses(compressed) == {"0": "completed"}
    report = out / "report"
    lines = [json.loads(line) for line in (report / "runs.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"run"}  # and no problem
    assert sorted(line["strategy"] for line in lines) == ["dense", "stable_rps"]
    assert "86.83" in (report / "table.md").read_text()  # of SynFlow, published, at 0.01
    assert (report / "index.html").exists()
