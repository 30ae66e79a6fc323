"""One run whose processes torchrun, srun or the user has started."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from memfold.errors import InputError
from memfold.processes.external_launch import (
    ExternalLaunch,
    expand_for_launcher,
    external_launch,
    refuse_lone_node,
)
from memfold.processes.ranks import (
    LAUNCHER_VARIABLES,
    declare_parent,
    refuse_leftover_rank,
)
from memfold.train_command import launch
from training.jobs import REPOSITORY, SMALL
from training.launching import (
    clean_environment,
    finish,
    free_port,
    slurm_variables,
    start,
    start_slurm_tasks,
    start_torchrun,
)

RUN = (
    *(text for text in SMALL if text != "trainer=cpu"),
    "compression=stable_rps",
    "ratio=0.05",
    "trainer.max_epochs=2",
    "data.batch_size=50",
)


def torchrun_variables(rank: int = 0, num_nodes: int = 1, run_id: str = "none") -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": run_id,
        "RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": str(num_nodes),
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (torchrun_variables(3, 2), ExternalLaunch("torchrun", 3, 2, 2)),
        (slurm_variables(5, 8, 2), ExternalLaunch("srun", 5, 4, 2)),
        (slurm_variables(0, 1), None),
        ({**slurm_variables(0, 2), "SLURM_JOB_NAME": "interactive"}, None),
        # torchrun inside of a SLURM job
        ({**slurm_variables(0, 2), **torchrun_variables(1)}, ExternalLaunch("torchrun", 1, 2, 1)),
    ],
)
def test_launchers_are_recognised(
    environment: dict[str, str], expected: ExternalLaunch | None
) -> None:
    assert external_launch(environment) == expected


def test_batch_script_without_srun_is_refused() -> None:
    environment = {**slurm_variables(0, 4), "SLURM_TASK_PID": "7"}
    del environment["SLURM_STEP_ID"]
    with pytest.raises(InputError, match="start each with `srun"):
        external_launch(environment)


def test_nothing_is_added_without_a_launcher() -> None:
    given = ["-m", "seed=1,2", "trainer=cpu"]
    assert expand_for_launcher(given, {}) == given
    assert expand_for_launcher(given, {"NODE_RANK": "0"}) == given
    # Lightning's own child on another node
    assert expand_for_launcher(given, {"NODE_RANK": "1", "LOCAL_RANK": "1"}) == given


def test_first_process_of_another_node_writes_nothing_of_hydra() -> None:
    added = expand_for_launcher(["hydra.run.dir=x"], {"NODE_RANK": "1"})[1:]
    assert added == ["hydra.job.name=train_ddp_on_node_1", "hydra.output_subdir=null"]


def test_all_tasks_of_srun_get_one_folder() -> None:
    environments = [slurm_variables(rank, 4, 2) for rank in range(4)]
    common = [
        "seed=1",
        "trainer.devices=2",
        "trainer.num_nodes=2",
        "hydra.run.dir='outputs/slurm-4711'",
    ]
    for rank, environment in enumerate(environments):
        silent = [f"hydra.job.name=train_ddp_process_{rank}", "hydra.output_subdir=null"]
        expected = common if rank == 0 else [*common, *silent]
        assert expand_for_launcher(["seed=1"], environment) == expected
        assert environment["SLURM_NTASKS_PER_NODE"] == "2"
        # The step of a job may start the run again, with what was added.
        assert expand_for_launcher(expected, environment) == expected


def test_second_step_of_a_job_gets_its_own_folder() -> None:
    environment = {**slurm_variables(0, 2), "SLURM_STEP_ID": "3"}
    assert "hydra.run.dir='outputs/slurm-4711-3'" in expand_for_launcher([], environment)


def test_nodes_of_torchrun_take_the_folder_from_the_name_of_the_run() -> None:
    for rank in (0, 2):
        environment = torchrun_variables(rank, num_nodes=2, run_id="my run/7")
        added = expand_for_launcher([], environment)
        assert added[:3] == [
            "trainer.devices=2",
            "trainer.num_nodes=2",
            "hydra.run.dir='outputs/torchrun-my_run_7'",
        ]


@pytest.mark.parametrize("given", [["hydra.run.dir=x"], ["resume=x"]])
def test_folder_that_is_given_stays(given: list[str]) -> None:
    added = expand_for_launcher(given, torchrun_variables(num_nodes=2))
    assert added == [*given, "trainer.devices=2", "trainer.num_nodes=2"]


@pytest.mark.parametrize(
    ("devices", "added"),
    [
        ("-1", ["trainer.devices=2"]),
        ("auto", ["trainer.devices=2"]),
        ("2", []),
        ("[4,5]", []),
    ],
)
def test_number_of_devices_is_that_of_the_launcher(devices: str, added: list[str]) -> None:
    given = ["resume=x", f"trainer.devices={devices}"]
    expanded = expand_for_launcher(given, torchrun_variables())
    assert expanded == [*given, *added, "trainer.num_nodes=1"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["-m"], torchrun_variables(), "-m under torchrun"),
        (["--multirun", "seed=1,2"], slurm_variables(0, 2), "-m under srun"),
        (["hydra.mode=MULTIRUN"], slurm_variables(0, 2), "-m under srun"),
        (["trainer.devices=3"], torchrun_variables(), r"devices=3, but torchrun .* make it 2"),
        (["trainer.devices=[0]"], slurm_variables(0, 2), r"devices=1, but srun .* make it 2"),
        (["++trainer.num_nodes=2"], torchrun_variables(), r"num_nodes=2, but .* make it 1"),
        ([], torchrun_variables(num_nodes=2), "--rdzv-id=NAME"),
        ([], {**slurm_variables(0, 3, 2), "SLURM_NODEID": "0"}, "all nodes need as many"),
    ],
)
def test_contradictions_are_refused(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        expand_for_launcher(arguments, environment)


def test_several_nodes_need_an_address_and_a_folder() -> None:
    complete = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"}
    with pytest.raises(InputError, match="missing: MASTER_PORT, NODE_RANK"):
        refuse_lone_node(2, has_folder=True, environment={"MASTER_ADDR": "a"})
    with pytest.raises(InputError, match=r"same new folder with hydra\.run\.dir="):
        refuse_lone_node(2, has_folder=False, environment=complete)
    refuse_lone_node(2, has_folder=True, environment=complete)
    refuse_lone_node(1, has_folder=False, environment={})
    with pytest.raises(InputError, match="NODE_RANK=1, but there is one node"):
        refuse_lone_node(1, has_folder=False, environment={**complete, "NODE_RANK": "1"})
    refuse_lone_node(2, has_folder=False, environment=torchrun_variables(num_nodes=2))


def test_a_rank_that_nobody_has_given_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 would wait for the others, or another rank would keep its results to itself."""
    for name in (*LAUNCHER_VARIABLES, "MEMFOLD_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, rank in (("LOCAL_RANK", "0"), ("LOCAL_RANK", "1"), ("RANK", "1")):
        with monkeypatch.context() as leftover:
            leftover.setenv(name, rank)
            assert launch(lambda: pytest.fail("started")) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: the environment has {name}={rank}, but torchrun has not")
        assert err.count("\n") == 1
    refuse_leftover_rank({"RANK": "0", "WORLD_SIZE": "1"})
    refuse_leftover_rank(torchrun_variables(rank=1))
    child = {"LOCAL_RANK": "1"}
    declare_parent(child)
    refuse_leftover_rank(child)


@pytest.mark.ddp
def test_several_nodes_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    process = start(
        tmp_path, sys.executable, str(REPOSITORY / "train.py"), *RUN, "trainer.num_nodes=2"
    )
    status, _, err = finish(process)
    assert status == 1
    assert err.startswith("error: trainer.num_nodes=2: start train.py with torchrun or srun")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


CHILD = """
import signal, sys, time
from memfold.processes import ranks
ranks._SECONDS_TO_END = 1.0
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ranks.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
from memfold.processes.ranks import declare_parent
declare_parent(os.environ)
for kind in ("willing", "deaf"):
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1], kind], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.ddp
def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = start(tmp_path, sys.executable, "-c", PARENT, CHILD)
    assert parent.stdout is not None
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.communicate(timeout=20)  # until the children have closed stderr, too
    assert not any(Path(f"/proc/{pid}/cwd").exists() for pid in children)


def run_folder(work: Path) -> Path:
    """Return the one run folder that was made below `work`, and check that rank 0 alone wrote."""
    (result,) = work.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "completed"
    assert len(list(work.rglob("overrides.yaml"))) == 1
    assert [path.name for path in work.rglob("*.log") if "slurm" not in path.name] == ["train.log"]
    return result.parent


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(folder: Path, expected: Path) -> None:
    first, second = weights(folder), weights(expected)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run whose processes Lightning starts."""
    work = tmp_path_factory.mktemp("plain")
    command = (sys.executable, str(REPOSITORY / "train.py"), *RUN, "trainer=ddp_cpu")
    status, _, err = finish(start(work, *command))
    assert status == 0, err
    return run_folder(work)


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_trains_one_run(plain: Path, tmp_path: Path) -> None:
    """Without trainer.devices: the launcher knows."""
    options = ("--standalone", "--nproc-per-node=2")
    status, _, err = finish(
        start_torchrun(tmp_path, *RUN, "trainer=ddp_cpu", "trainer.devices=-1", options=options)
    )
    assert status == 0, err
    folder = run_folder(tmp_path)
    assert re.fullmatch(
        r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d+", str(folder.relative_to(tmp_path))
    )
    assert_same_weights(folder, plain)


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_resumes(plain: Path, tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node=2")
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    longer = (f"resume={folder}", "trainer.max_epochs=3")
    status, _, err = finish(start_torchrun(tmp_path, *longer, options=options))
    assert status == 0, err
    assert run_folder(tmp_path) == folder
    other = tmp_path / "other" / "run"
    shutil.copytree(plain, other)
    command = (sys.executable, str(REPOSITORY / "train.py"), f"resume={other}", longer[1])
    status, _, err = finish(start(tmp_path, *command))
    assert status == 0, err
    assert_same_weights(folder, other)


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_trains_on_two_nodes(plain: Path, tmp_path: Path) -> None:
    address = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two", address)
    agents = [start_torchrun(tmp_path, *RUN, "trainer=ddp_cpu", options=options) for _ in range(2)]
    for agent in agents:
        status, _, err = finish(agent)
        assert status == 0, err
    folder = run_folder(tmp_path)
    assert folder == tmp_path / "outputs" / "torchrun-two"
    assert_same_weights(folder, plain)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_srun_trains_one_run(num_nodes: int, plain: Path, tmp_path: Path) -> None:
    tasks = start_slurm_tasks(tmp_path, *RUN, "trainer=ddp_cpu", num_nodes=num_nodes)
    for task in tasks:
        status, _, err = finish(task)
        assert status == 0, err
    folder = run_folder(tmp_path)
    assert folder == tmp_path / "outputs" / "slurm-4711"
    assert_same_weights(folder, plain)


@pytest.mark.slow
@pytest.mark.ddp
def test_one_slurm_task_starts_the_processes_itself(plain: Path, tmp_path: Path) -> None:
    command = (sys.executable, str(REPOSITORY / "train.py"), *RUN, "trainer=ddp_cpu")
    environment = clean_environment(**slurm_variables(0, 1))
    status, _, err = finish(start(tmp_path, *command, environment=environment))
    assert status == 0, err
    assert_same_weights(run_folder(tmp_path), plain)
