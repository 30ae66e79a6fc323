"""A single run knows nothing of studies, nor of what reads its results."""

import subprocess
import sys
from pathlib import Path

from training.jobs import REPOSITORY, SMALL

CODE = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
rooms = ("studies", "reporting", "benchmarking")
print([name for name in sys.modules if name.startswith(tuple(f"memfold.{room}" for room in rooms))])
"""


def test_a_single_run_imports_nothing_of_studies(tmp_path: Path) -> None:
    arguments = [*SMALL, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "run" / "result.json").exists()
