"""A run folder belongs to one process from before Hydra writes there."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from memfold.runs.recorded import read_config
from training.jobs import REPOSITORY
from training.launching import clean_environment

JOB = """
import sys
import hydra
from hydra.core.hydra_config import HydraConfig
from pathlib import Path

@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg):
    from memfold.runs.locks import locked
    print("started", flush=True)
    sys.stdin.readline()  # what a run imports and composes before it has its lock
    with locked(Path(HydraConfig.get().runtime.output_dir)):
        print("locked", flush=True)

main()
"""


def test_a_refused_second_run_leaves_the_first_ones_record(tmp_path: Path) -> None:
    """The first run holds its folder before Hydra writes there, long before it trains."""
    program, folder = tmp_path / "job.py", tmp_path / "run"
    program.write_text(JOB.replace("CONF", repr(str(REPOSITORY / "conf"))))

    def start(seed: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(program), f"seed={seed}", f"hydra.run.dir={folder}"],
            env=clean_environment(PYTHONPATH=os.pathsep.join(sys.path)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start(1)
    assert first.stdout is not None
    assert first.stdout.readline() == "started\n"
    second = start(2)
    out, err = second.communicate("\n", timeout=60)
    assert (second.returncode, out) == (1, "")
    assert "is in use by another process" in err
    assert yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) == ["seed=1"]
    out, _ = first.communicate("\n", timeout=60)
    assert out == "locked\n"
    assert read_config(folder, ["seed"]) == {"seed": 1}
