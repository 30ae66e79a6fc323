"""The signals that end the runs of a command."""

import os
import signal

import pytest

from memfold.studies.executor import StopSignal


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
