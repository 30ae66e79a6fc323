"""Two ranks that train one job after the other, as torchrun starts them."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.forked import Script
from training.jobs import compose_job
from training.launching import clean_environment, free_port


def train_in_two_ranks(folder: Path, jobs: Mapping[str, Sequence[str]]) -> None:
    """Train jobs, each in the folder of its name below `folder`, in the same two processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([(name, free_port(), given) for name, given in jobs.items()]))
    run_two_ranks([__file__, str(file)], folder)


def run_two_ranks(command: Sequence[str], folder: Path) -> None:
    """Run a script as two ranks in `folder`, with the variables that torchrun sets."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "none",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        Script(command, folder, clean_environment(RANK=rank, LOCAL_RANK=rank, **common))
        for rank in ("0", "1")
    ]
    for rank in ranks:
        status, _, err = rank.finish()
        assert status == 0, err


def main(file: Path) -> None:
    """Train the jobs of a file."""
    from memfold.training import run

    for name, port, overrides in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)  # elsewhere these ranks find the job before
        run(compose_job(file.parent / name, *overrides))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
