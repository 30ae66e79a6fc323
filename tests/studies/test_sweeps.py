"""Sweeps: progress, records and how they are resumed; a small program stands in for the jobs."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from memfold.errors import InputError
from memfold.overrides import folder_override, quote_value
from memfold.reporting.reading import read
from memfold.runs.sweep import SweepPlan
from memfold.studies.sweep import num_parallel_jobs
from memfold.studies.sweep_plan import expand_sweep_arguments
from studies.sweeps import (
    STAND_IN,
    finish,
    let,
    seen,
    start_sweep,
    statuses,
    sweep,
    wait_until,
    write_plan,
)

JOBS = ("compression=snip", "seed=1,2,3,4")


@pytest.mark.ddp
def test_failures_are_recorded_and_resumed(tmp_path: Path) -> None:
    """Jobs that fail, or are killed, take no other with them; only they are run again."""
    folder = tmp_path / "sweep"
    let(folder, 1, "fail")
    let(folder, 2, "kill")
    status, out, err = sweep(folder, *JOBS)
    assert status == 1
    assert err == (
        f"error: 2 of 4 jobs failed; run them again with: python {shlex.quote(str(STAND_IN))} "
        f"-m sweep.resume={folder}\n"
    )
    lines = out.splitlines()
    assert lines[0] == (
        f"4 jobs in {folder}, one after the other; what each prints is in <job>/console.log, "
        "its progress in <job>/train.log"
    )
    assert lines[1].startswith("[1/4] 0: seed=1: completed, test/acc 91.23 %, 23,672 bytes, ")
    assert lines[2] == "[2/4] 1: seed=2: failed: as it was told"
    assert lines[3] == "[3/4] 2: seed=3: failed: its process was killed by SIGKILL"
    assert lines[4].startswith("[4/4] 3: seed=4: completed, ")
    assert "4 jobs in" in lines[5]
    assert out.count("failed    │") == 2
    assert "HYDRA" not in out
    assert "hello" not in out
    assert (folder / "0" / "console.log").read_text() == "hello from the job\n"
    assert not (folder / "0" / ".hydra").exists()  # the job's own process writes it
    plan = json.loads((folder / "sweep.json").read_text())
    assert plan["jobs"] == [["compression=snip", f"seed={seed}"] for seed in (1, 2, 3, 4)]

    let(folder, 1, "")
    let(folder, 2, "")
    (folder / "2" / "checkpoints").mkdir()
    (folder / "2" / "checkpoints" / "last.ckpt").touch()
    status, out, err = sweep(folder, f"sweep.resume={folder}")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1:3] == [
        "[1/4] 0: seed=1: already completed",
        "[2/4] 3: seed=4: already completed",
    ]
    assert lines[3].startswith("[3/4] 1: seed=2: completed")
    assert [len(seen(folder, job)) for job in range(4)] == [1, 2, 2, 1]
    assert f"resume='{folder}/2'" in seen(folder, 2)[1]["argv"]
    assert not any("resume" in text for text in seen(folder, 1)[1]["argv"])
    assert seen(folder, 1)[0]["argv"] == seen(folder, 1)[1]["argv"]


@pytest.mark.ddp
def test_a_strategy_with_one_ratio_is_run_once_a_seed(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    let(folder, 0, "fail")
    status, out, err = sweep(folder, "compression=dense,snip", "ratio=0.1,0.01")
    assert status == 1
    assert err.startswith("error: 1 of 3 jobs failed; run them again with: ")
    assert out.startswith(
        f"4 jobs in {folder}, one after the other; 1 would repeat another, whose strategy has one "
        "ratio: not run; what each prints"
    )
    assert "[3/3] 3: compression=snip ratio=0.01: completed" in out
    (row,) = (line for line in out.splitlines() if "is job 0" in line)
    assert row.split("│")[1:3] == [" 1   ", " dense       "]
    assert statuses(folder) == {"0": "failed", "2": "completed", "3": "completed"}
    assert not (folder / "1").exists()

    let(folder, 0, "")
    status, out, err = sweep(folder, f"sweep.resume={folder}")
    assert (status, err) == (0, "")
    assert "[3/3] 0: compression=dense ratio=0.1: completed" in out
    assert list(statuses(folder)) == ["0", "2", "3"]
    assert not any("never started" in problem.reason for problem in read([folder])[1])


@pytest.mark.ddp
def test_jobs_of_a_sweep_from_before_are_not_given_up(tmp_path: Path) -> None:
    let(tmp_path, 1, "fail")
    sweep(tmp_path, "compression=dense", "seed=1,2")
    plan = json.loads((tmp_path / "sweep.json").read_text())
    assert plan.pop("repeats") == {}
    jobs = [["compression=dense", f"ratio={ratio}"] for ratio in (0.1, 0.01)]
    arguments = ["-m", "compression=dense", "ratio=0.1,0.01"]
    plan |= {"jobs": jobs, "arguments": arguments}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    for number, overrides in enumerate(jobs):
        file = tmp_path / ".sweep" / "jobs" / f"{number}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"overrides": overrides}))
    let(tmp_path, 1, "")
    status, out, err = sweep(tmp_path, f"sweep.resume={tmp_path}")
    assert (status, err) == (0, "")
    assert "is job" not in out
    assert statuses(tmp_path) == {"0": "completed", "1": "completed"}


@pytest.mark.ddp
def test_folder_of_a_running_sweep_is_refused(tmp_path: Path) -> None:
    let(tmp_path, 0, "sleep")
    running = start_sweep(tmp_path, "seed=1")
    try:
        wait_until((tmp_path / "0" / "sleeps").exists)
        status, out, err = sweep(tmp_path, f"sweep.resume={tmp_path}")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {tmp_path} is in use by another process")
        assert err.count("\n") == 1
    finally:
        running.terminate()
        assert finish(running)[0] == 143
    assert statuses(tmp_path) == {"0": "failed"}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    arguments = ["-m", "seed=1,2", "ratio=0.1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    write_plan(tmp_path, arguments, ["seed=1"], ["seed=2"])
    return tmp_path


def expand(folder: Path, *arguments: str) -> list[str]:
    own = [f"hydra.sweep.dir='{folder}'", "hydra.callbacks.sweep.resume=true"]
    expanded = expand_sweep_arguments(["-m", *arguments, f"sweep.resume={folder}"])
    assert expanded[-2:] == own
    return expanded[:-2]


def test_resumed_sweep_has_the_recorded_overrides(recorded: Path) -> None:
    experiment = ["-m", "seed=1,2", "ratio=0.1"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    assert expand(recorded) == [*experiment, *joblib]
    assert expand(recorded, "ratio=0.1") == [*experiment, *joblib]
    other = ["hydra/launcher=submitit_local"]
    assert expand(recorded, *other) == [*experiment, *other]
    assert expand(recorded, "seed=1,2", "ratio=0.1", *other) == [*experiment, *other]
    assert expand(recorded, "hydra.verbose=true") == [*experiment, *joblib, "hydra.verbose=true"]
    assert expand(recorded, f"hydra.sweep.dir={recorded}") == [*experiment, *joblib]
    assert expand_sweep_arguments(["-m", "seed=1", "sweep.resume=null"]) == ["-m", "seed=1"]
    assert expand_sweep_arguments(["-m", "seed=1,2"]) == ["-m", "seed=1,2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "seed=1,3", "ratio=0.1"], "that sweep was started without seed=1,3; a resumed"),
        (["-m", "seed=1,2", "+x=1", "~y"], "that sweep was started without +x=1 ~y; a resumed"),
        (["-m", "hydra.sweep.subdir=x"], "was started without hydra.sweep.subdir=x; a resumed"),
        (["-m", "--config-name", "other"], "started without --config-name other; a resumed"),
        (["-m", "hydra.sweep.dir=elsewhere"], "hydra.sweep.dir=elsewhere is another"),
        ([], "continues a sweep: python train.py -m sweep.resume=FOLDER"),
    ],
)
def test_other_sweep_is_refused(recorded: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        expand_sweep_arguments([*arguments, f"sweep.resume={recorded}"])
    assert message in str(error.value)


def test_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of a sweep"):
        expand_sweep_arguments(["-m", f"sweep.resume={tmp_path}"])


@pytest.mark.parametrize("text", ["{", "[]", '{"command": "", "arguments": 5}'])
def test_damaged_plan_is_named(recorded: Path, text: str) -> None:
    (recorded / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=r"sweep\.json is damaged.* in another folder"):
        expand_sweep_arguments(["-m", f"sweep.resume={recorded}"])


@pytest.mark.parametrize("name", ["plain", "s p,a=1 (x)", "it's", "${now:%Y}", "a{b}", "1,2"])
def test_printed_command_is_read_back(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_plan(folder, ["-m", "seed=1,2"], ["seed=1"], ["seed=2"])
    printed = shlex.join(["-m", folder_override("sweep.resume", folder)])
    expanded = expand_sweep_arguments(shlex.split(printed))
    assert expanded[:2] == ["-m", "seed=1,2"]
    [override] = OverridesParser.create().parse_overrides(expanded[2:3])
    assert str(override.value()).replace(r"\${", "${") == str(folder)
    assert ("'" in printed) == (name != "plain")


@pytest.mark.ddp
def test_values_that_only_jobs_know(tmp_path: Path) -> None:
    """Folders named after a swept key, an override that refers to the job's number."""
    folder = tmp_path / "s p,a=1 (x)"
    folder.mkdir()
    (folder / "lr1e+30.do").write_text("fail")
    status, out, err = sweep(
        tmp_path,
        "seed=${hydra:job.num}",
        "optimizer.lr=0.1,1e30",
        "hydra.sweep.subdir='lr${optimizer.lr}'",
        f"hydra.sweep.dir={quote_value(str(folder))}",
    )
    assert status == 1
    assert err.startswith("error: 1 of 2 jobs failed; ")
    again = shlex.split(err.partition("with: ")[2])
    assert expand_sweep_arguments(again[2:])[1].startswith("seed=")
    assert statuses(folder) == {"lr0.1": "completed", "lr1e+30": "failed"}
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    assert [[row[1], row[5], row[6]] for row in rows] == [
        ["lr0.1", "0.1", "completed"],
        ["lr1e+30", "1e+30", "failed"],
    ]
    assert "┃ optimizer.lr ┃" in out


def refused(folder: Path, *arguments: str) -> str:
    """Return the one line with which a sweep is refused before anything starts."""
    status, out, err = sweep(folder, *arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert not list(folder.rglob("result.json"))
    return err


@pytest.mark.ddp
def test_sweep_that_cannot_be_looked_after_is_refused(tmp_path: Path) -> None:
    for subdir, message in (
        ("same", "hydra.sweep.subdir gives jobs 0 and 1 one folder, same; name each swept key"),
        ("${x}", "'x' not found"),
    ):
        arguments = (f"hydra.sweep.subdir={subdir}", "seed=1,2")
        status, out, err = sweep(tmp_path / "a", *arguments)  # again in the same folder
        assert (status, out.count("\n"), err.count("\n")) == (1, 1, 1)
        assert message in err
        assert not list((tmp_path / "a").rglob("result.json"))
    err = refused(tmp_path / "b", "seed=1,2", "hydra.sweep.dir='x${hydra:job.num}'")
    assert "hydra.sweep.dir must be the same for all jobs" in err
    err = refused(tmp_path / "c", "seed=range(1,1)")
    assert "seed=range(1,1): there is no such value" in err


def test_no_jobs_at_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"hydra\.launcher\.n_jobs=0: 1 or more"):
        num_parallel_jobs({"n_jobs": 0})
    with pytest.raises(InputError, match=r"hydra\.launcher\.n_jobs=two: 1 or more"):
        num_parallel_jobs({"n_jobs": "two"})


@pytest.mark.ddp
def test_damaged_files_of_a_sweep(tmp_path: Path) -> None:
    """Of a run whose checkpoint is damaged, the log alone is kept; of a plan, nothing helps."""
    let(tmp_path, 0, "fail")
    conf = tmp_path / "conf"
    shutil.copytree(STAND_IN.parents[2] / "conf", conf)
    first = ("seed=1,2", f"--config-path={conf}")
    assert sweep(tmp_path, *first)[0] == 1
    let(tmp_path, 0, "")
    (tmp_path / "0" / "checkpoints").mkdir()
    (tmp_path / "0" / "checkpoints" / "last.ckpt").write_text("damaged")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    status, out, err = sweep(tmp_path, f"sweep.resume={tmp_path}", *first, *joblib)
    assert (status, err) == (0, ""), out
    assert not (tmp_path / "0" / "checkpoints").exists()
    console = (tmp_path / "0" / "console.log").read_text()
    assert console.count("hello") == 3
    assert "damaged" in console
    [run] = seen(tmp_path, 0)
    assert run["argv"][run["argv"].index("--config-path") + 1] == str(conf)
    plan = SweepPlan.find(tmp_path / "sweep.json")
    assert plan is not None
    assert plan.attempt == 2
    assert not any("joblib" in text for text in plan.arguments)  # for that time alone

    (tmp_path / "sweep.json").write_text("{")
    status, _, err = sweep(tmp_path, *first)
    assert status == 1
    assert "holds a sweep whose sweep.json is missing or damaged; choose another folder" in err
