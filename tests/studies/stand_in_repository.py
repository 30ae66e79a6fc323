"""A repository of quick programs: what `scripts/reproduce.py` starts, without training."""

import json
from pathlib import Path

from training.jobs import REPOSITORY, TESTS

_SWEEP = f"""
import runpy
import sys

sys.path.insert(0, {str(TESTS)!r})
runpy.run_path({str(TESTS / "studies" / "sweep_stand_in.py")!r}, run_name="__main__")
"""

# Leaves its arguments, then does what the file beside it says.
_PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

here = Path(__file__).parent
with (here / f"{Path(__file__).stem}.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
action = here / f"{Path(__file__).stem}.do"
words = action.read_text().split() if action.exists() else []
if words[:1] == ["interrupt"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), getattr(signal, words[1]))
    time.sleep(60)
if words == ["fail"]:
    sys.exit(1)
"""


def write_repository(root: Path, *, with_sweeps: bool = False) -> None:
    """Write `train.py`, `scripts/report.py` and a published curve.

    Args:
        root: The folder.
        with_sweeps: Whether `train.py` is a real sweep, of jobs that do next to nothing.
    """
    for folder in ("scripts", "results/published"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for experiment in ("cifar10_vgg11", "cifar100_vgg11"):
        (root / "results" / "published" / f"synflow_{experiment}.csv").touch()
    if not (root / "conf").exists():
        (root / "conf").symlink_to(REPOSITORY / "conf")
    (root / "train.py").write_text(_SWEEP if with_sweeps else _PROGRAM)
    (root / "scripts" / "report.py").write_text(_PROGRAM)


def let(root: Path, program: str, behaviour: str) -> None:
    """Tell a program what to do."""
    (root / f"{program}.do").write_text(behaviour)


def calls(root: Path, program: str) -> list[list[str]]:
    """Return the arguments of every start of a program."""
    file = root / f"{program}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
