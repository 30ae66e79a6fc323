"""Which process is this: known from the environment, before torch is imported."""

import os

__all__ = ["LAUNCHER_VARIABLES", "is_rank_zero"]

LAUNCHER_VARIABLES = (
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
)
"""Set by Lightning's launcher and left behind: the next job would take itself for a child."""


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)
