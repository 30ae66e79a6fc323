"""A repository of quick programs: what `scripts/reproduce.py` starts, without training."""

import importlib.util
import json
from pathlib import Path

from studies.plans import STAND_IN
from training.jobs import REPOSITORY

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


def load_script():
    """Import `scripts/reproduce.py`."""
    file = REPOSITORY / "scripts" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def write_repository(root: Path) -> None:
    """Write `train.py`, which is quick, `scripts/report.py` and a published curve."""
    for folder in ("scripts", "results/published"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for experiment in ("cifar10_vgg11", "cifar100_vgg11"):
        (root / "results" / "published" / f"synflow_{experiment}.csv").touch()
    (root / "conf").symlink_to(REPOSITORY / "conf")
    program = f'import runpy\n\nrunpy.run_path({str(STAND_IN)!r}, run_name="__main__")\n'
    (root / "train.py").write_text(program)
    (root / "scripts" / "report.py").write_text(_PROGRAM)


def let(root: Path, behaviour: str) -> None:
    """Tell `scripts/report.py` what to do."""
    (root / "scripts" / "report.do").write_text(behaviour)


def reports(root: Path) -> list[list[str]]:
    """Return the arguments of every start of `scripts/report.py`."""
    file = root / "scripts" / "report.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
