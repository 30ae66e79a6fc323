"""Which process is this, and whose: known from the environment, before torch is imported."""

import os
import signal
import threading
import time
from collections.abc import Mapping, MutableMapping

from memfold.errors import InputError

__all__ = [
    "LAUNCHER_VARIABLES",
    "declare_parent",
    "end_with_parent",
    "is_rank_zero",
    "refuse_leftover_rank",
]

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
)
"""Set by launchers and left behind: the next job would take itself for a child."""

_PARENT = "MEMFOLD_PARENT_PID"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_END = 20.0
"""From SIGTERM to SIGKILL: time to save a checkpoint; one that takes longer is left unfinished."""


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def refuse_leftover_rank(environment: Mapping[str, str]) -> None:
    """Check that this process has its rank, if any, from what has started it.

    A variable that another program has left behind would make rank 0 take itself for another: it
    would wait for the others, or keep its results to itself.

    Args:
        environment: The variables of this process, before `end_with_parent`.

    Raises:
        InputError: A rank is set by nobody that starts ranks.
    """
    if "TORCHELASTIC_RUN_ID" in environment or _PARENT in environment:
        return
    for name, is_leftover in (
        ("LOCAL_RANK", "LOCAL_RANK" in environment),
        ("RANK", environment.get("RANK", "0") != "0"),
    ):
        if is_leftover:
            raise InputError(
                f"the environment has {name}={environment[name]}, but torchrun has not started "
                f"this process: `unset {name}` if another program has left it behind"
            )


def declare_parent(environment: MutableMapping[str, str]) -> None:
    """Let a process that this one starts directly, with `environment`, end when this one has gone.

    Args:
        environment: The variables of the process to be started; changed in place.
    """
    environment[_PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """End when the process that has declared itself the parent of this one has gone.

    However it went: a process that was killed can tell its children nothing. This one gets SIGTERM
    and, if that does not end it within 20 seconds, SIGKILL: a rank that waits in a collective for
    one that is dead handles no signal. Without a declared parent nothing happens.
    """
    declared = os.environ.pop(_PARENT, None)  # not for the children of this process
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun declares nothing, and can be killed too
        declared = str(os.getppid())
    if declared is None or not declared.isdecimal():
        return
    parent = int(declared)
    if os.getppid() == parent or not _exists(parent):
        threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_END)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
