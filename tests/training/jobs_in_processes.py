"""Jobs in processes of their own that a test may kill, without the seconds of the imports."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from training.forked import CONTEXT


def run_job(folder: Path, *overrides: str, as_nobody: bool = False) -> int:
    """Run a job as `run(compose_job(folder, *overrides))` would run it here.

    Args:
        folder: The run folder. What the job says goes into a file beside it.
        overrides: Of the configuration.
        as_nobody: Run without the rights of root.

    Returns:
        The exit status, or minus the signal that killed the job.
    """
    output = folder.with_name(f"{folder.name}.txt")
    job = CONTEXT.Process(target=_run, args=(folder, overrides, output, as_nobody), daemon=True)
    job.start()
    job.join(120)
    if job.exitcode is None:
        job.kill()
        raise TimeoutError(f"the job in {folder} hangs")
    return job.exitcode


def output_of(folder: Path) -> str:
    """Return what the jobs in `folder` have said."""
    return folder.with_name(f"{folder.name}.txt").read_text()


def _run(folder: Path, overrides: Sequence[str], output: Path, as_nobody: bool) -> None:
    import torch

    from memfold.training import run
    from training.jobs import compose_job

    torch.set_num_threads(1)
    # W&B's process of an earlier test, whose address the fork server has kept.
    os.environ.pop("WANDB_SERVICE", None)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        cfg = compose_job(folder, *overrides)
        if as_nobody and os.geteuid() == 0:
            os.setuid(65534)
        run(cfg)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
