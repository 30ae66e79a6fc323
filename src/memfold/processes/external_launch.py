"""One run whose processes somebody else has started: torchrun, srun, or one command per node.

Every process composes its configuration on its own, before the ranks know each other. So what they
must agree on, the run folder above all, is derived here from what all of them find alike, and
given to Hydra as overrides. The processes that Lightning starts get theirs from rank 0.
"""

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hydra.core.override_parser.types import Override

from memfold.errors import InputError
from memfold.overrides import quote_value, split

__all__ = ["ExternalLaunch", "expand_for_launcher", "external_launch", "refuse_lone_node"]

_FOLDER = "hydra.run.dir"
_ASK_FOR_FOLDER = f"give all processes the same new folder with {_FOLDER}="


@dataclass(frozen=True)
class ExternalLaunch:
    """The place of this process in a run that was started from outside."""

    name: str
    """What the user started: torchrun or srun."""
    rank: int
    """Of this process, over all nodes."""
    num_processes: int
    """Per node."""
    num_nodes: int


def external_launch(environment: Mapping[str, str]) -> ExternalLaunch | None:
    """Recognise torchrun, and srun with several tasks, as Lightning does.

    Args:
        environment: The variables of this process.

    Returns:
        `None` for a process that starts the others itself, or is started so.

    Raises:
        InputError: A SLURM batch script has several tasks, but did not start this one with srun.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return ExternalLaunch(
            "torchrun",
            int(environment["RANK"]),
            int(environment["LOCAL_WORLD_SIZE"]),
            int(environment["GROUP_WORLD_SIZE"]),
        )
    num_tasks = int(environment.get("SLURM_NTASKS") or "1")
    is_shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if num_tasks == 1 or is_shell or "SLURM_PROCID" not in environment:
        return None
    if "SLURM_TASK_PID" in environment and "SLURM_STEP_ID" not in environment:
        raise InputError(
            f"this SLURM job has {num_tasks} tasks: start each with `srun python train.py ...`, "
            "or ask for one task (see scripts/train_slurm.sh)"
        )
    num_nodes = int(
        environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    )
    per_node, rest = divmod(num_tasks, num_nodes)
    if rest:
        raise InputError(
            f"srun started {num_tasks} tasks on {num_nodes} nodes: all nodes need as many "
            "(srun --ntasks-per-node=)"
        )
    return ExternalLaunch("srun", int(environment["SLURM_PROCID"]), per_node, num_nodes)


def expand_for_launcher(
    arguments: Sequence[str], environment: MutableMapping[str, str]
) -> list[str]:
    """Add to a command line what the processes of an external launcher must have in common.

    That is the run folder and the number of processes, unless they are given. A process that is
    not rank 0 writes no `.hydra`, and a log file of its own if it has anything to say.

    Args:
        arguments: The command line after the program's name.
        environment: The variables of this process; what Lightning misses in them is added.

    Raises:
        InputError: A sweep, values that contradict the launcher's, or no folder that all processes
            could derive.
        OverrideParseException: Hydra cannot read an override.
    """
    launch = external_launch(environment)
    if launch is None:
        node = environment.get("NODE_RANK", "0")
        is_first_of_node = "LOCAL_RANK" not in environment
        added = _silent(f"on_node_{node}") if is_first_of_node and node != "0" else []
        return [*arguments, *added]
    given = split(arguments)[1]
    is_sweep = "-m" in arguments or "--multirun" in arguments
    if is_sweep or str(_value(given, "hydra.mode")) == "MULTIRUN":
        raise InputError(
            f"-m under {launch.name}: a sweep starts the processes of each job itself; without "
            f"{launch.name}: python train.py -m trainer=ddp trainer.devices=N ... "
            "(on SLURM with hydra/launcher=submitit_slurm)"
        )
    added = []
    for key, count in (
        ("trainer.devices", launch.num_processes),
        ("trainer.num_nodes", launch.num_nodes),
    ):
        _refuse_contradiction(given, key, count, launch)
        if not isinstance(_value(given, key), list):
            added.append(f"{key}={count}")
    if _value(given, _FOLDER) is None and _value(given, "resume") is None:
        folder = _torchrun_folder if launch.name == "torchrun" else _slurm_folder
        added.append(f"{_FOLDER}={quote_value(folder(launch, environment))}")
    if launch.rank > 0:
        added += _silent(f"process_{launch.rank}")
    if launch.name == "srun":
        # Lightning asks for it, and srun sets it only when told the tasks per node.
        environment.setdefault("SLURM_NTASKS_PER_NODE", str(launch.num_processes))
    return [*arguments, *(text for text in added if text not in arguments)]


def refuse_lone_node(
    num_nodes: object, *, has_folder: bool, environment: Mapping[str, str]
) -> None:
    """Check that Lightning, when it starts the processes itself, can do so on several nodes.

    Args:
        num_nodes: `trainer.num_nodes` as configured.
        has_folder: Whether the run folder was given, not derived from the time.
        environment: The variables of this process.

    Raises:
        InputError: The nodes cannot find each other, or would use a folder each.
    """
    if not isinstance(num_nodes, int) or external_launch(environment) is not None:
        return
    if num_nodes <= 1:
        if environment.get("NODE_RANK", "0") != "0":
            raise InputError(
                f"the environment has NODE_RANK={environment['NODE_RANK']}, but there is one node "
                "(trainer.num_nodes): unset it, or say how many nodes there are"
            )
        return
    needed = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise InputError(
            f"trainer.num_nodes={num_nodes}: start train.py with torchrun or srun, or once per "
            f"node with {', '.join(needed)} set (missing: {', '.join(missing)})"
        )
    if not has_folder:
        raise InputError(
            f"trainer.num_nodes={num_nodes}: every node would make a folder of its own; "
            f"{_ASK_FOR_FOLDER}"
        )


def _value(given: Sequence[Override], key: str) -> object:
    """Return what the user has set `key` to; `None` if nothing."""
    values = [override.value() for override in given if override.key_or_group == key]
    return values[-1] if values else None


def _refuse_contradiction(
    given: Sequence[Override], key: str, count: int, launch: ExternalLaunch
) -> None:
    value = _value(given, key)
    wanted = len(value) if isinstance(value, list) else value
    # -1 is "all": as many as there are processes.
    if isinstance(wanted, int) and wanted not in (count, -1):
        raise InputError(
            f"{key}={wanted}, but {launch.name} has started {launch.num_processes} process(es) on "
            f"each of {launch.num_nodes} node(s): leave {key} out, or make it {count}"
        )


def _silent(process: str) -> list[str]:
    return [f"hydra.job.name=train_ddp_{process}", "hydra.output_subdir=null"]


def _torchrun_folder(launch: ExternalLaunch, environment: Mapping[str, str]) -> str:
    if launch.num_nodes > 1:
        run_id = environment["TORCHELASTIC_RUN_ID"]
        if run_id in ("", "none"):
            raise InputError(
                f"torchrun on {launch.num_nodes} nodes: every node would make a folder of its own; "
                f"name the run with --rdzv-id=NAME, or {_ASK_FOR_FOLDER}"
            )
        return f"outputs/torchrun-{re.sub(r'[^A-Za-z0-9_.-]', '_', run_id)}"
    pid, start = _torchrun_process()
    return f"outputs/{start:%Y-%m-%d}/{start:%H-%M-%S}-{pid}"


def _torchrun_process() -> tuple[int, datetime]:
    """Return number and start of torchrun: the nearest ancestor that does not have its variables.

    The ranks need not be its direct children: it may start them through a shell script.
    """
    import psutil

    process = psutil.Process(os.getppid())
    for ancestor in psutil.Process().parents():
        process = ancestor
        try:
            if "TORCHELASTIC_RUN_ID" not in ancestor.environ():
                break
        except psutil.Error:  # not ours: nothing above it is torchrun either
            break
    return process.pid, datetime.fromtimestamp(process.create_time())


def _slurm_folder(launch: ExternalLaunch, environment: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" not in environment:
        raise InputError(f"SLURM_JOB_ID is not set; {_ASK_FOR_FOLDER}")
    # A job that is requeued keeps its number and counts its steps from 0 again.
    step = environment.get("SLURM_STEP_ID", "0")
    return f"outputs/slurm-{environment['SLURM_JOB_ID']}" + ("" if step == "0" else f"-{step}")
