"""A sweep as `train.py` runs it, whose jobs are a small program instead of a training.

`python sweep_stand_in.py -m ...` is the sweep. The program does what the sweep's folder says in a
file named after the job (its number), or completes at once. It does not import torch.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"


def run_program(arguments: list[str]) -> None:
    """Be a job: leave what it saw and a result in its folder."""
    [text] = [text for text in arguments if text.startswith("hydra.run.dir=")]
    folder = Path(text.removeprefix("hydra.run.dir=").strip("'"))
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_NTASKS", "SUBMITIT_EXECUTOR")
    seen = {name: os.environ.get(name) for name in names}
    with (folder / "seen.jsonl").open("a") as file:
        file.write(json.dumps({"argv": arguments, "start": time.time(), **seen}) + "\n")
    print("hello from the job", flush=True)

    def finish(status: str, **facts: object) -> None:
        result = {"status": status, "seed": 7, **facts}
        (folder / "result.json").write_text(json.dumps(result))

    def end(number: int, _: object) -> None:
        finish("failed", error=f"ended by {signal.Signals(number).name}")
        if number == signal.SIGTERM:
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").write_text("")
        sys.exit(128 + number)

    last = folder / "checkpoints" / "last.ckpt"
    if last.exists() and last.read_text() == "damaged":
        assert any(text.startswith("resume=") for text in arguments)
        reason = f"resume: {last} is truncated, damaged or no checkpoint; start a new run"
        finish("failed", error=reason)
        sys.exit(f"error: {reason}")
    finish("failed", error="not finished")
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    behaviour = folder.parent / f"{folder.name}.do"
    words = behaviour.read_text().split() if behaviour.exists() else []
    if words == ["nap"]:
        time.sleep(1)
    if words == ["stubborn"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        (folder / "sleeps").touch()
        time.sleep(60)
    if words in (["sleep"], ["kill", "parent"]):
        from memfold.processes.ranks import end_with_parent

        end_with_parent()
        (folder / "sleeps").touch()
        if "kill" in words:
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if words == ["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if words == ["fail"]:
        finish("failed", error="as it was told")
        sys.exit(1)
    metrics = {"test/acc": 0.9123, "val/acc": 0.5}
    finish("completed", metrics=metrics, memory={"stored_bytes": 23672})


def run_sweep() -> int:
    """Be what `train.py` is."""
    import hydra
    from omegaconf import DictConfig

    from memfold import train_command

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
    def main(cfg: DictConfig) -> float | None:
        return train_command.run_task(cfg, script=Path(__file__).resolve())

    return train_command.launch(main)


if __name__ == "__main__":
    if "hydra.mode=RUN" in sys.argv:
        run_program(sys.argv[1:])
    else:
        sys.exit(run_sweep())
