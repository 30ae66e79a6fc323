"""The signals that end the runs of a command."""

import os
import signal
import time
from pathlib import Path

import pytest

from memfold.studies.process import StopSignal, run_program


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_shell_may_have_chosen_that_ctrl_c_is_ignored(is_ignored: bool) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopSignal()
    if is_ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.caught():
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.event.is_set() != is_ignored
        assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == is_ignored
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("lets_save", [True, False])
def test_whoever_asks_again_does_not_wait(lets_save: bool) -> None:
    stop = StopSignal(lets_save=lets_save)
    assert stop.wanted() is None
    stop.note(signal.SIGINT)
    stop.note(signal.SIGTERM)  # of the same request: a group and its members are signalled both
    assert stop.wanted() == (signal.SIGTERM if lets_save else signal.SIGINT)
    stop.since -= 3
    stop.note(signal.SIGINT)
    assert stop.wanted() == signal.SIGKILL


def test_a_run_that_does_not_listen_is_killed_when_it_is_asked_again(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    )
    output = tmp_path / "output"
    asked: list[float] = []

    def wanted_stop() -> signal.Signals | None:
        if not output.read_text():
            return None
        asked.append(time.monotonic())
        return signal.SIGKILL if asked[-1] > asked[0] + 0.5 else signal.SIGTERM

    status, _ = run_program(["-c", f"{code}; time.sleep(60)"], output, wanted_stop=wanted_stop)
    assert status == -signal.SIGKILL
    assert time.monotonic() - asked[0] < 10
