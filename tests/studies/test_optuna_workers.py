"""Workers that are killed, stopped, suspended, or several."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memfold.runs.folder import is_completed
from memfold.runs.locks import is_held
from memfold.studies.process import StopSignal
from memfold.studies.runner import Runner, share_out, share_work
from studies.tuned import (
    Worker,
    num_starts,
    open_study,
    report,
    settings,
    trials,
    tune,
    write_space,
)

SLOW = {"STAND_IN_SECONDS": "0.2"}


def wait_until(condition: Callable[[], bool], worker: Worker | None = None) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        assert worker is None or worker.is_running(), worker.output("stderr")
        time.sleep(0.02)


@pytest.mark.ddp
def test_killed_and_interrupted_studies_go_on_to_what_an_undisturbed_one_finds(
    tmp_path: Path,
) -> None:
    (tmp_path / "undisturbed").mkdir()
    assert tune(tmp_path / "undisturbed", 3) == 0
    folder = tmp_path / "disturbed"
    folder.mkdir()
    runs = folder / "study" / "trials"
    places = [("0/s2", signal.SIGKILL), ("1/s1", signal.SIGINT)]
    for place, number in places:
        worker = Worker(folder, 3, **SLOW)
        checkpoint = runs / place / "checkpoints" / "last.ckpt"
        wait_until(checkpoint.exists, worker)
        worker.send_signal(number)  # to the worker alone: its run is left to itself
        status, _, err = worker.finish()
        assert status == (-9 if number == signal.SIGKILL else 128 + number)
        assert ("interrupted" in err) == (number != signal.SIGKILL)
        wait_until(lambda place=place: not is_held(runs / place / ".lock"))  # nothing is left alone
    assert tune(folder, 3) == 0
    assert settings(folder) == settings(tmp_path / "undisturbed")
    assert [trial.value for trial in trials(folder)] == [
        trial.value for trial in trials(tmp_path / "undisturbed")
    ]
    assert report(folder)["num_trials"] == {"completed": 3, "pruned": 0, "failed": 0}
    assert [trial.notes.seconds for trial in trials(folder)] == [
        2.0
    ] * 3  # two runs of 1 s of training
    for place, _ in places:
        assert (runs / place / "starts").read_text() == "new\nresume\n"
    assert num_starts(runs) == 2 * 3 + 2


@pytest.mark.ddp
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    workers = [Worker(tmp_path, 4, "--workers", workers, **SLOW) for workers in ("2", "1")]
    ended = [worker.finish() for worker in workers]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert [trial.state for trial in trials(tmp_path)] == ["completed"] * 4
    assert len({str(setting) for setting in settings(tmp_path)}) == 4
    assert num_starts(tmp_path / "study" / "trials") == 8  # no run was started twice
    assert num_starts(tmp_path / "study" / "test") == 2
    assert all(any(line.startswith("trial ") for line in out.splitlines()) for _, out, _ in ended)
    assert report(tmp_path)["num_trials"]["completed"] == 4


@pytest.mark.ddp
def test_a_trial_that_ends_while_another_worker_looks_is_not_lost(tmp_path: Path) -> None:
    worker = Worker(tmp_path, 1, STAND_IN_SECONDS="1")
    folder = tmp_path / "study" / "trials" / "0"
    wait_until((folder / "s1" / "checkpoints" / "last.ckpt").exists, worker)
    study = open_study(tmp_path)
    with study.claimed():
        wait_until(lambda: is_completed(folder / "s2"), worker)
        time.sleep(0.5)
        assert [trial.state for trial in study.trials()] == ["running"]
    assert worker.finish()[0] == 0
    assert [trial.state for trial in study.trials()] == ["completed"]


def test_epochs_that_were_judged_before_an_interruption_stay_as_they_are(tmp_path: Path) -> None:
    assert tune(tmp_path, 1) == 0
    study = open_study(tmp_path)
    with study.claimed():
        before = study.next_trial()
    before.report(0.25, 0)  # then its worker was killed
    assert [trial.state for trial in study.trials()] == ["completed", "waiting"]
    assert tune(tmp_path, 2) == 0
    last = study.optuna.trials[-1]
    assert last.params == before.params
    assert last.intermediate_values[0] == 0.25
    assert len(last.intermediate_values) == 3


def test_a_setting_that_was_half_drawn_is_completed(tmp_path: Path) -> None:
    write_space(tmp_path)
    study = open_study(tmp_path)
    drawn = study.optuna.ask()  # then its worker was killed
    study.space.parameters["optimizer.lr"].suggest(drawn, "optimizer.lr")
    assert tune(tmp_path, 1) == 0
    [trial] = trials(tmp_path)
    assert trial.state == "completed"
    assert trial.setting["optimizer.lr"] == drawn.params["optimizer.lr"]
    assert set(trial.setting) == {"optimizer.lr", "scheduler"}


def test_cores_and_gpus_are_divided() -> None:
    cores = len(os.sched_getaffinity(0))

    def variables(num_slots: int, **environment: str) -> list[dict[str, str]]:
        return share_out(num_slots, environment)

    threads = {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    gpus = "CUDA_VISIBLE_DEVICES"
    assert variables(1, CUDA_VISIBLE_DEVICES="0,1,2") == [{}]
    assert variables(2, CUDA_VISIBLE_DEVICES="") == [threads, threads]
    assert variables(2, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="5") == [{}, {}]
    divided = variables(2, CUDA_VISIBLE_DEVICES="0,1,5")
    assert [found[gpus] for found in divided] == ["0,5", "1"]
    shared = variables(3, CUDA_VISIBLE_DEVICES="4,7")
    assert [found[gpus] for found in shared] == ["4", "7", "4"]


def test_an_error_of_one_worker_stops_the_others(tmp_path: Path) -> None:
    stop = StopSignal()

    def work(worker: Runner, number: int) -> None:
        if number == 0:
            raise OSError("disk")
        assert stop.event.wait(60)

    with pytest.raises(OSError, match="disk"):
        share_work(range(9), [Runner(tmp_path, stop), Runner(tmp_path, stop)], work)
