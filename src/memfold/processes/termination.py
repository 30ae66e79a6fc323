"""SIGTERM, by which schedulers ask a job to give way: noted where somebody looks, else obeyed.

Whoever trains looks at it between two steps (`training.preemption`). At any other time there is
nothing to save that is not on the disk: the signal raises, as Ctrl-C does.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

from memfold.processes.external_launch import external_launch

__all__ = ["Termination", "heeding_sigterm"]

TERMINATED = 143  # 128 + SIGTERM, what a shell expects
_SECONDS_TO_END = 120.0
"""From the first signal to the end, when nobody looks at it: the validation may have to end."""
_SECONDS_OF_ONE_REQUEST = 5.0
"""Schedulers signal a process group and its members; only what comes later is impatience."""


class Termination:
    """Whether this process has been asked to end, and what that does."""

    def __init__(self) -> None:
        self.is_requested = False
        self.is_deferred = False
        """Whether somebody looks at `is_requested` soon."""
        # Then Lightning's launcher has started this process, and rank 0 is its parent.
        is_local = external_launch(os.environ) is None
        is_child = is_local and os.environ.get("LOCAL_RANK", "0") != "0"
        self._launching_process = os.getppid() if is_child else None

    @property
    def exit_status(self) -> int:
        """Return 143; but the observer of Lightning's launcher kills rank 0 when a child fails."""
        return 0 if self._launching_process is not None else TERMINATED

    def request(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.is_requested = True
        if not self.is_deferred:
            self.obey()

    def obey(self) -> None:
        """End this process if it has been asked to; a child lets the process that started it do so.

        Raises:
            SIGTERMException: With the exit status.
        """
        if not self.is_requested:
            return
        if self._launching_process is not None and os.getppid() == self._launching_process:
            os.kill(self._launching_process, signal.SIGTERM)
            return
        raise SIGTERMException(self.exit_status)


@contextmanager
def heeding_sigterm() -> Iterator[Termination]:
    """Handle SIGTERM in the block, which must run in the main thread to have any effect.

    Python runs a handler between two operations of the main thread, which may hang in one of them.
    So a thread watches too, and ends the process 120 seconds after the first signal, or at the
    second one.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    previous = signal.signal(signal.SIGTERM, termination.request)
    threading.Thread(target=_watch, args=(receiver,), name="sigterm", daemon=True).start()
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.set_wakeup_fd(previous_descriptor)
        sender.close()


def _watch(receiver: socket.socket) -> None:
    with receiver:
        while (byte := receiver.recv(1)) != bytes([signal.SIGTERM]):
            if not byte:  # the block has ended
                return
        first = time.monotonic()
        while (left := first + _SECONDS_TO_END - time.monotonic()) > 0:
            receiver.settimeout(left)
            try:
                byte = receiver.recv(1)
            except TimeoutError:
                break
            if not byte:
                return
            is_later = time.monotonic() > first + _SECONDS_OF_ONE_REQUEST
            if byte == bytes([signal.SIGTERM]) and is_later:
                break
        os._exit(TERMINATED)
