"""Behaves like train.py where tuning looks: folders, metrics.csv, result.json, resume, locks.

It "trains" in milliseconds: the accuracy is largest for optimizer.lr=0.1 and grows with the epochs.
Variables of the environment make it slow (STAND_IN_SECONDS, per epoch), or fail.
"""

import fcntl
import importlib.util
import json
import math
import os
import sys
import time
import types
from pathlib import Path

MEMFOLD = Path(__file__).parents[2] / "src" / "memfold"


def main() -> None:
    end_with_parent()
    if any(name.startswith("SLURM_") for name in os.environ):
        refuse("SLURM's variables are of another job")
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    resume = given.pop("resume", "").strip("'")
    folder = Path(resume or given["hydra.run.dir"].strip("'"))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if resume:
        if checkpoint.read_text() == "damaged":
            refuse(f"resume: {checkpoint} is truncated, damaged or no checkpoint")
        given = json.loads((folder / "overrides.json").read_text())
    elif checkpoint.exists() or read_result(folder).get("status") == "completed":
        refuse(f"hydra.run.dir={folder} is used")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.json").write_text(json.dumps(given))
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two in one folder: a traceback
        with (folder / "starts").open("a") as starts:
            starts.write("resume\n" if resume else "new\n")
        train(folder, checkpoint, given)


def train(folder: Path, checkpoint: Path, given: dict[str, str]) -> None:
    lr, seed = float(given["optimizer.lr"]), int(given["seed"])
    write_result(folder, {"status": "failed", "error": "not finished"})
    if lr > float(os.environ.get("STAND_IN_LARGEST_LR", "inf")):
        write_result(folder, {"status": "failed", "error": "the loss is nan at step 3"})
        refuse("the loss is nan at step 3")
    metrics = folder / "metrics.csv"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if first == 0:
        metrics.write_text("step,epoch,val/acc,val/bpb\n")
    num_epochs, accuracy = int(given["trainer.max_epochs"]), 0.0
    for epoch in range(first, num_epochs):
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
        accuracy = (epoch + 1) / num_epochs * (0.9 - 0.3 * (math.log10(lr) + 1) ** 2) + seed / 1000
        with metrics.open("a") as file:
            file.write(f"{epoch},{epoch},,\n{epoch},{epoch},{accuracy},{3 - accuracy}\n")
        checkpoint.write_text(str(epoch + 1))
    found = {"val/acc": accuracy, "val/best_acc": accuracy, "val/bpb": 3 - accuracy}
    if given.get("trainer.limit_test_batches") != "0":
        found |= {"test/acc": accuracy / 2, "test/bpb": 4 - accuracy}
    result = {"status": "completed", "metrics": found, "time": {"fit_seconds": 1.0}}
    if "STAND_IN_CHANCE" in os.environ:
        chance = float(os.environ["STAND_IN_CHANCE"])
        result |= {"chance": chance, "samples": {"train": 900, "val": 100}}
    write_result(folder, result)


def refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def read_result(folder: Path) -> dict:
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_result(folder: Path, result: dict) -> None:
    (folder / "result.json").write_text(json.dumps(result))


def end_with_parent() -> None:
    """Call memfold's own function without running memfold's `__init__`, which imports torch."""
    sys.modules["memfold"] = package = types.ModuleType("memfold")
    package.__path__ = [str(MEMFOLD)]
    file = MEMFOLD / "processes" / "ranks.py"
    spec = importlib.util.spec_from_file_location("processes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.end_with_parent()


if __name__ == "__main__":
    main()
