"""A rank that torchrun has started, which trains one job after the other: see `train_in_two_ranks`.

Most of what a short job takes is the start of its processes.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.jobs import compose_job
from training.launching import clean_environment, finish, free_port, start


def train_in_two_ranks(folder: Path, jobs: Mapping[str, Sequence[str]]) -> None:
    """Train jobs, each in the folder of its name below `folder`, in the same two processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([(name, free_port(), given) for name, given in jobs.items()]))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    environment = clean_environment(GLOO_SOCKET_IFNAME="lo")
    process = start(folder, *command, __file__, str(file), environment=environment)
    status, _, err = finish(process)
    assert status == 0, err


def main(file: Path) -> None:
    """Train the jobs of a file."""
    from memfold.training import run

    for name, port, overrides in json.loads(file.read_text()):
        # torchrun has one meeting place, where these ranks would find those of the job before.
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        run(compose_job(file.parent / name, *overrides))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
