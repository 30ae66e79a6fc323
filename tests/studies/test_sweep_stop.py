"""However a sweep is stopped, its jobs end, and it can be resumed."""

import os
import signal
import time
from pathlib import Path

import pytest

from studies.sweeps import (
    finish,
    let,
    processes_of,
    seen,
    start_sweep,
    statuses,
    sweep,
    wait_until,
)

ONE_BY_ONE: tuple[str, ...] = ()
SLOTS = ("hydra.launcher.n_jobs=2",)
SUBMITIT = ("hydra/launcher=submitit_local",)


def stop_and_resume(
    folder: Path, launcher: tuple[str, ...], number: signal.Signals, *, group: bool = False
) -> tuple[int, str, str]:
    """Signal a sweep whose first jobs sleep; return how it ended, after it has been resumed."""
    let(folder, 0, "sleep")
    let(folder, 1, "sleep")
    running = start_sweep(folder, "seed=1,2,3", *launcher)
    sleeping = (0, 1) if launcher else (0,)
    for job in sleeping:
        wait_until((folder / str(job) / "sleeps").exists)
    (os.killpg if group else os.kill)(running.pid, number)
    ended = finish(running)
    # A process that was killed can tell its children nothing: they look after it.
    wait_until(lambda: not processes_of(folder), seconds=30 if number == signal.SIGKILL else 0.1)
    let(folder, 0, "")
    let(folder, 1, "")
    status, out, err = sweep(folder, f"sweep.resume={folder}")
    assert (status, err) == (0, ""), out
    assert statuses(folder) == {"0": "completed", "1": "completed", "2": "completed"}
    was_saved = number != signal.SIGINT
    for job in sleeping:
        is_resumed = f"resume='{folder}/{job}'" in seen(folder, job)[-1]["argv"]
        assert is_resumed == was_saved  # the program saves something on SIGTERM alone
    return ended


@pytest.mark.ddp
def test_terminated_sweep_terminates_its_job(tmp_path: Path) -> None:
    let(tmp_path, 0, "sleep")
    running = start_sweep(tmp_path, "seed=1,2,3")
    wait_until((tmp_path / "0" / "sleeps").exists)
    running.terminate()
    status, out, err = finish(running)
    assert status == 143
    assert "[1/3] 0: seed=1: failed: ended by SIGTERM" in out
    assert "3 jobs in" in out
    assert out.count("missing") == 2
    assert err.startswith("error: 1 of 3 jobs failed and 2 left no result; ")
    assert err.count("\n") == 1
    assert not processes_of(tmp_path)


@pytest.mark.ddp
@pytest.mark.slow
def test_interrupted_sweep_interrupts_its_jobs(tmp_path: Path) -> None:
    status, out, err = stop_and_resume(tmp_path, SLOTS, signal.SIGINT, group=True)
    assert status == 130
    assert out.count("failed: ended by SIGINT") == 2
    assert err.startswith("error: 2 of 3 jobs failed and 1 left no result; ")
    assert err.count("\n") == 1


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE_BY_ONE, SLOTS, SUBMITIT], ids=["basic", "slots", "sub"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True])
def test_stopped_sweep_leaves_no_process(
    tmp_path: Path, launcher: tuple[str, ...], number: signal.Signals, group: bool
) -> None:
    status, out, _ = stop_and_resume(tmp_path, launcher, number, group=group)
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == 128 + number
        assert "3 jobs in" in out


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE_BY_ONE, SLOTS, SUBMITIT], ids=["basic", "slots", "sub"])
def test_second_interrupt_kills(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    let(tmp_path, 0, "stubborn")
    running = start_sweep(tmp_path, "seed=1,2", *launcher)
    wait_until((tmp_path / "0" / "sleeps").exists)
    running.send_signal(signal.SIGINT)
    time.sleep(3)
    running.send_signal(signal.SIGINT)
    start = time.monotonic()
    status, out, _ = finish(running)
    assert status == 130
    assert "2 jobs in" in out
    assert time.monotonic() - start < 10
    wait_until(lambda: not processes_of(tmp_path), seconds=5)
