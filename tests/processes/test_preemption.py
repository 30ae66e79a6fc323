"""SIGTERM: a checkpoint, a result that says so, status 143, and an exact continuation."""

import json
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from memfold.errors import InputError
from memfold.processes import termination as termination_module
from memfold.processes.termination import heeding_sigterm
from memfold.training import run
from training.jobs import SMALL, compose_job, train
from training.run_contents import SENSITIVE, STRATEGIES, differences, epoch_rows, state

WholeRun = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Uninterrupted runs, each made when it is asked for."""
    folders: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy)
            run(compose_job(folders[strategy], *SENSITIVE, *STRATEGIES[strategy]))
        return folders[strategy]

    return make


def sigterm_in(hook: str, number: int, rank: object = "null", round: int = 0) -> list[str]:
    options = {"hook": hook, "number": number, "rank": rank, "round": round}
    return [
        "+callbacks.sender._target_=training.signals.SignalAt",
        *(f"+callbacks.sender.{key}={value}" for key, value in options.items()),
    ]


def assert_terminated(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    reason = f"terminated (SIGTERM); continue with: python train.py resume={folder}"
    assert result["status"] == "failed"
    assert result["error"].startswith(reason)
    named = shlex.split(result["error"].removeprefix(reason))  # code, for which no folder stands
    assert all("=training." in text for text in named)


# 10 steps an epoch; the rounds of a lottery ticket start at step 13.
@pytest.mark.parametrize(
    ("strategy", "moment", "num_steps", "options"),
    [
        ("dense", ("on_train_batch_end", 17), 17, ()),
        ("dense", ("on_train_batch_end", 20), 20, ("checkpoint.asynchronous=true",)),
        ("dense", ("on_train_batch_end", 40), 40, ()),
        ("dense", ("on_validation_batch_end", 4), 20, ()),
        ("dense", ("on_train_epoch_start", 2), 11, ()),
        ("dense", ("on_test_batch_end", 1), 40, ()),
        ("rigl", ("on_train_batch_end", 14), 14, ()),
        ("ltr", ("on_train_batch_end", 13), 13, ()),
        ("ltr", ("on_test_batch_end", 1), 30, ()),
        ("ltr", ("on_train_batch_end", 5, "null", 1), 18, ("checkpoint.asynchronous=true",)),
    ],
)
def test_stopped_and_resumed_run_is_the_uninterrupted_one(
    whole: WholeRun,
    tmp_path: Path,
    strategy: str,
    moment: tuple[Any, ...],
    num_steps: int,
    options: tuple[str, ...],
) -> None:
    job = (*SENSITIVE, *STRATEGIES[strategy], *options)
    expected = whole(strategy)
    with pytest.raises(SystemExit) as stop:
        run(compose_job(tmp_path, *job, *sigterm_in(*moment)))
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_terminated(tmp_path)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == num_steps
    run(compose_job(tmp_path, *job, f"resume={tmp_path}"))
    assert not differences(tmp_path, expected)


def test_summed_up_gradients_are_not_lost(tmp_path: Path) -> None:
    job = (*SENSITIVE, *STRATEGIES["dense"], "trainer.accumulate_grad_batches=3")
    run(compose_job(tmp_path / "whole", *job))
    cut = tmp_path / "cut"
    with pytest.raises(SystemExit):
        run(compose_job(cut, *job, *sigterm_in("on_train_batch_end", 14)))
    last = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6  # 4 in the first epoch, 2 of 3 batches each in the second
    run(compose_job(cut, *job, f"resume={cut}"))
    assert not differences(cut, tmp_path / "whole")


def test_signal_before_training_leaves_a_run_that_can_be_started_again(tmp_path: Path) -> None:
    job = (*SENSITIVE, *STRATEGIES["dense"])
    with pytest.raises(SystemExit) as stop:
        run(compose_job(tmp_path, *job, *sigterm_in("setup", 1)))
    assert stop.value.code == 143
    assert_terminated(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert run(compose_job(tmp_path, *job, f"resume={tmp_path}"))["status"] == "completed"


def _hang(in_python: bool, seconds_to_end: float, seconds_of_one_request: float) -> None:
    termination_module._SECONDS_TO_END = seconds_to_end
    termination_module._SECONDS_OF_ONE_REQUEST = seconds_of_one_request
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with heeding_sigterm() as termination:
        termination.is_deferred = True
        os.kill(os.getppid(), signal.SIGUSR1)
        if in_python:
            threading.Event().wait()
        store.wait(["a key that nobody sets"], timedelta(seconds=100))


@pytest.fixture
def ready() -> Iterator[threading.Event]:
    """Set when the child has sent SIGUSR1."""
    event = threading.Event()
    previous = signal.signal(signal.SIGUSR1, lambda *_: event.set())
    yield event
    signal.signal(signal.SIGUSR1, previous)


@pytest.mark.ddp
@pytest.mark.parametrize("in_python", [True, False])
@pytest.mark.parametrize(
    ("seconds_to_end", "seconds_of_one_request", "num_signals"), [(0.5, 5, 1), (60, 0.2, 3)]
)
def test_a_process_that_hangs_ends(
    ready: threading.Event,
    in_python: bool,
    seconds_to_end: float,
    seconds_of_one_request: float,
    num_signals: int,
) -> None:
    arguments = (in_python, seconds_to_end, seconds_of_one_request)
    child = multiprocessing.get_context("fork").Process(target=_hang, args=arguments, daemon=True)
    child.start()
    assert ready.wait(10)
    for _ in range(num_signals):
        time.sleep(0.15)
        assert child.is_alive()
        os.kill(child.pid or 0, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 143


def on_two_ranks(*job: str) -> list[str]:
    """Half the batch on each."""
    kept = [text for text in job if text not in ("trainer=cpu", "data.batch_size=128")]
    return [*kept, "trainer=ddp_cpu", "data.batch_size=64"]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_stop_when_one_is_signalled_and_one_process_goes_on(tmp_path: Path) -> None:
    # Neither dropout nor BatchNorm: they see other batches on two ranks.
    common = (*SMALL, "data.batch_size=128", "data.crop_padding=1", *STRATEGIES["stable_rps"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(compose_job(whole, *common))
    sender = sigterm_in("on_train_batch_end", 17, rank=1)
    status, out, err = train(*on_two_ranks(*common), *sender, f"hydra.run.dir={cut}")
    assert (status, err) == (143, "")
    assert out.count("terminated (SIGTERM)") == 1
    assert_terminated(cut)
    last = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 18  # all ranks know of the signal one step later
    resume = (*common, f"resume={cut}")
    with pytest.raises(
        InputError, match=r"is 128 in that run, not 50; .*data\.batch_size=128 on 1"
    ):
        run(compose_job(cut, *resume, "data.batch_size=50"))
    run(compose_job(cut, *resume))
    expected = state(whole)
    for name, tensor in state(cut).items():
        # Sums in another order, over 18 steps.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    for found, row in zip(epoch_rows(cut), epoch_rows(whole), strict=True):
        assert found.keys() == row.keys()
        for name, value in row.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-3), name


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("strategy", "hook", "number", "rank"),
    [
        ("dense", "on_train_batch_end", 17, "null"),
        ("dense", "on_train_batch_end", 17, 0),
        ("rigl", "on_train_batch_end", 17, 1),
        ("stable_rps", "on_train_batch_end", 20, 1),
        ("stable_rps", "on_validation_batch_end", 2, 1),
        ("ltr", "on_train_batch_end", 13, 0),
        ("ltr", "on_test_batch_end", 1, "null"),
        ("dense", "on_test_batch_end", 1, 0),
        ("dense", "on_test_batch_end", 1, 1),
    ],
)
def test_two_ranks_stop_and_go_on_exactly(
    two_ranks: WholeRun, tmp_path: Path, strategy: str, hook: str, number: int, rank: object
) -> None:
    job = on_two_ranks(*SENSITIVE, *STRATEGIES[strategy], "checkpoint.asynchronous=true")
    status, _, err = train(*job, *sigterm_in(hook, number, rank), f"hydra.run.dir={tmp_path}")
    assert (status, err) == (143, "")
    assert_terminated(tmp_path)
    named = [text for text in (*job, *sigterm_in(hook, number)) if "=training." in text]
    status, _, err = train(f"resume={tmp_path}", *named, "~callbacks.sender")
    assert (status, err) == (0, "")
    assert not differences(tmp_path, two_ranks(strategy))


@pytest.mark.slow
@pytest.mark.ddp
def test_the_number_of_ranks_may_change_twice(tmp_path: Path) -> None:
    common = (*SMALL, "data.batch_size=128", "data.crop_padding=1", *STRATEGIES["stable_rps"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(compose_job(whole, *common))
    sender = sigterm_in("on_train_batch_end", 12, rank=0)
    status, _, _ = train(*on_two_ranks(*common), *sender, f"hydra.run.dir={cut}")
    assert status == 143
    sender = sigterm_in("on_train_batch_end", 12)
    with pytest.raises(SystemExit):
        run(compose_job(cut, *common, *sender, f"resume={cut}"))
    status, _, err = train(
        f"resume={cut}", "trainer=ddp_cpu", "data.batch_size=64", sender[0], "~callbacks.sender"
    )
    assert (status, err) == (0, "")
    expected = state(whole)
    for name, tensor in state(cut).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Uninterrupted runs on two ranks."""
    folders: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy)
            job = on_two_ranks(*SENSITIVE, *STRATEGIES[strategy])
            status, _, err = train(*job, f"hydra.run.dir={folders[strategy]}")
            assert status == 0, err
        return folders[strategy]

    return make
