"""W&B's process and variables, out of the way of a test that starts runs itself."""

import os

import pytest
import wandb


def forget_wandb(patch: pytest.MonkeyPatch) -> None:
    """End W&B's process of earlier tests and take its variables away until `patch` is undone.

    The process ends first: it takes its address out of the variables then, and `patch` would
    put the address of a dead process back.
    """
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
