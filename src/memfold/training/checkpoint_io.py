"""Checkpoints that are there in full or not at all, and that training need not wait for."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from memfold.files import replacing

__all__ = ["AsyncCheckpointIO", "AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, then rename.

    A run that is killed while it saves keeps the checkpoint that it had, and one that runs out of
    disk space leaves no partial file behind.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Save `checkpoint` to the local file `path`.

        Raises:
            InputError: The file cannot be written; `path` is then what it was.
        """
        with replacing(Path(path)) as file:
            _serialise(checkpoint, file)


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Make the bytes of the file at once, and write them while training goes on.

    So everything in a checkpoint is of one moment, whatever changes later, and it takes main
    memory, once per file, but none of the GPU. (Lightning's class of that name clones the tensors
    where they are, and lets writes queue up without limit when the disk is slow.) Files are written
    in the order in which they were saved; after one that could not be written none is.
    """

    def __init__(self) -> None:
        self._writer: ThreadPoolExecutor | None = None
        self._pending: dict[Path, Future[None]] = {}
        self._has_failed = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Begin to save `checkpoint` to the local file `path`.

        Raises:
            InputError: A file saved earlier could not be written; it is then what it was.
        """
        path = Path(path)
        done = [other for other, pending in self._pending.items() if pending.done()]
        for other in (*done, path):  # a second copy of one file would have to wait in memory
            self._wait_for(other)
        contents = io.BytesIO()
        _serialise(checkpoint, contents)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending[path] = self._writer.submit(self._write, contents, path)

    def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a file, once nothing is being written.

        Raises:
            InputError: A file saved earlier could not be written.
        """
        self._finish()
        return super().load_checkpoint(*arguments, **options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, once nothing is being written.

        Raises:
            InputError: A file saved earlier could not be written.
        """
        self._finish()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait until everything is written. Lightning calls this when fit ends, however it does.

        Raises:
            InputError: A file could not be written; it is then what it was.
        """
        try:
            self._finish()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _finish(self) -> None:
        for path in list(self._pending):
            self._wait_for(path)

    def _wait_for(self, path: Path) -> None:
        pending = self._pending.pop(path, None)
        if pending is not None:
            pending.result()

    def _write(self, contents: io.BytesIO, path: Path) -> None:
        if self._has_failed:  # `last` must not speak of a `best` that is not there
            return
        try:
            with replacing(path) as file:
                file.write(contents.getbuffer())
        except BaseException:
            self._has_failed = True
            raise


def _serialise(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch closes its archive after a failed write, which fails again.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
