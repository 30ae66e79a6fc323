"""Callbacks that signal their own process at a chosen moment."""

import os
import resource
import signal
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from memfold.training.round_tracker import RoundFolder


class SignalAt(Callback):
    """Sends a signal in a hook, when it is called for the number-th time in a round."""

    def __init__(
        self,
        hook: str,
        number: int = 1,
        signal: str = "SIGTERM",
        rank: int | None = None,
        round: int = 0,
    ) -> None:
        self._left = number
        self._signal = signal
        self._rank = rank
        self._round = round
        setattr(self, hook, self._count)

    def _count(self, trainer: Trainer, *_: object, **__: object) -> None:
        if RoundFolder(Path(trainer.default_root_dir)).number != self._round:
            return
        self._left -= 1
        if self._left == 0 and self._rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.Signals[self._signal])


class FailAt(Callback):
    """Raises in a hook, when it is called for the number-th time."""

    def __init__(self, hook: str, number: int) -> None:
        self._left = number
        setattr(self, hook, self._count)

    def _count(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("power cut")


class FullDisk(Callback):
    """From an epoch on no file can have more than 4000 bytes."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self._epoch:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))


class KillWhileSaving(Callback):
    """Kills its process at a moment of writing a file for the number-th time.

    open: nothing is written yet; write: a part is; sync: all is, but it has not taken the place of
    the earlier file; renamed: it has.
    """

    def __init__(self, file: str, moment: str, number: int = 2) -> None:
        self._partial = f"{file}.partial"
        self._moment = moment
        self._left = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between the run and its files."""
        if stage == "fit":
            self._open, self._replace = Path.open, Path.replace
            Path.open = lambda path, *a, **k: self._opened(path, *a, **k)  # type: ignore
            Path.replace = lambda path, target: self._replaced(path, target)  # type: ignore

    def _opened(self, path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name != self._partial:
            return self._open(path, *arguments, **options)
        self._left -= 1
        self._kill_at("open")
        file = self._open(path, *arguments, **options)
        return _DyingFile(file) if self._left == 0 and self._moment == "write" else file

    def _replaced(self, path: Path, target: Path) -> Path:
        is_it = path.name == self._partial
        if is_it:
            self._kill_at("sync")
        result = self._replace(path, target)
        if is_it:
            self._kill_at("renamed")
        return result

    def _kill_at(self, moment: str) -> None:
        if self._left == 0 and self._moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)


class _DyingFile:
    """A file whose process is killed when 4000 bytes are on the disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __enter__(self) -> "_DyingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._file.write(bytes(data)[: 4000 - self._file.tell()])
        if self._file.tell() >= 4000:
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(bytes(data))

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()
