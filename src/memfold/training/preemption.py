"""SIGTERM, by which schedulers ask a job to give way: save a checkpoint, exit, be resumed.

While a network is trained the signal is only noted. All ranks stop at the same step, or at the end
of the validation that runs, and save `last.ckpt` there. At any other time there is nothing to save
that is not on the disk: the signal raises, as Ctrl-C does.

Lightning's own handling is switched off. It starts a collective inside the signal handler, which
hangs if the signal comes during another one; it heeds rank 0 alone; and it waits for the GPU in
every step.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from memfold.training.external_launch import external_launch
from memfold.training.run_folder import LAST_CHECKPOINT
from memfold.training.validation import is_followed_by_a_step

__all__ = ["Preemption", "Termination", "heeding_sigterm", "release_children"]

log = logging.getLogger(__name__)

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


class Preemption(Checkpoint):
    """Stop a Trainer at a step that all ranks agree on, with a checkpoint of it.

    It comes last of all callbacks, when whatever belongs to a step is done.
    """

    def __init__(self, termination: Termination, folder: Path, trainer: Trainer) -> None:
        """Take the place of Lightning's handling in `trainer`.

        Args:
            termination: Of this process.
            folder: The run folder.
            trainer: Not yet in use.
        """
        self._termination = termination
        self._path = folder / LAST_CHECKPOINT
        self._pending: Tensor | None = None
        self._last_step = 0
        self._is_agreed = False
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = _do_nothing
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on wait for the end of a step."""
        self._last_step = trainer.global_step
        self._termination.is_deferred = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        """Stop after an optimizer step, unless a validation or the end of an epoch follows."""
        self._is_agreed = self._is_agreed or self._agree(trainer)
        has_stepped = trainer.global_step > self._last_step  # not while gradients are summed up
        self._last_step = trainer.global_step
        if self._is_agreed and has_stepped and is_followed_by_a_step(trainer):
            trainer.save_checkpoint(self._path)
            _stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch."""
        self._pending = None
        requested = self._termination.is_requested
        if trainer.strategy.reduce_boolean_decision(requested, all=False):
            trainer.save_checkpoint(self._path)
            _stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on end at once."""
        self._termination.is_deferred = False
        self._termination.obey()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Training is over; another failure is not to be hidden by a signal that comes now."""
        self._termination.is_deferred = False

    def _agree(self, trainer: Trainer) -> bool:
        """Tell whether any rank had been signalled at the step before, without a pause for it."""
        requested = self._termination.is_requested
        if trainer.world_size == 1:
            return requested
        before = self._pending
        flag = torch.full((), float(requested), device=trainer.strategy.root_device)
        self._pending = trainer.strategy.reduce(flag, reduce_op="sum")  # pyright: ignore
        return before is not None and before.item() > 0


def release_children() -> None:
    """Keep the observer of Lightning's launcher from killing this process when a child ends.

    The children end with this process.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes.clear()


def _stop(trainer: Trainer) -> None:
    """Let Lightning raise where it has logged what it has to log."""
    connector: Any = trainer._signal_connector
    connector.received_sigterm = True


def _do_nothing(*_: object) -> None:
    """Stand in for a method of Lightning's."""


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
