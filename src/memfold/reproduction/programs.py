"""Programs that run one after the other, and end when this one is told to."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from memfold.processes.ranks import declare_parent

__all__ = ["Programs"]


class Programs:
    """Starts Python programs and hands Ctrl-C and SIGTERM on to the one that runs."""

    def __init__(self) -> None:
        """Start with none."""
        self._running: subprocess.Popen[bytes] | None = None
        self.stopped_by: signal.Signals | None = None
        """The signal after which no further program is to be started."""

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Handle the signals as long as the block runs."""
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell that starts a program in the background lets it ignore Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, arguments: Sequence[str]) -> int:
        """Run `python ARGUMENTS` to its end and return its exit status."""
        environment = dict(os.environ)
        declare_parent(environment)  # a kill of this process reaches the runs, too
        # A session of its own: the terminal's Ctrl-C reaches it through this process alone.
        self._running = subprocess.Popen(
            [sys.executable, *arguments], env=environment, start_new_session=True
        )
        if self.stopped_by is not None:  # while it was being started
            self._running.terminate()
        return self._running.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End what runs by SIGTERM, after which a run saves a checkpoint."""
        self.stopped_by = signal.Signals(number)
        if self._running is not None and self._running.poll() is None:
            self._running.terminate()
