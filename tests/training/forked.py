"""Scripts in processes of their own, without the seconds of their imports.

A server that has imported what they need forks for each. Where a test is about launchers, imports
or a process as its user starts it, `launching.start` starts a new Python instead.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "memfold.train_command",
        "memfold.studies.sweep",
        "memfold.training.job",
        "memfold.backbones",
        "memfold.data.digits",
        "hydra._internal.hydra",
    ]
)


class Script:
    """What `subprocess.Popen` is to a program: `python COMMAND`, in a session of its own."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        largest_file: int | None = None,
    ) -> None:
        """Start it in `folder`; it can write `largest_file` bytes to a file."""
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in pipes]
        arguments = (list(command), folder, dict(environment), largest_file, *writers)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        for writer in writers:
            writer.close()
        self._readers = [_Reader(reader) for reader, _ in pipes]

    def finish(self, seconds: float = 200) -> tuple[int, str, str]:
        """Wait until nobody can print any more; return exit status, stdout and stderr."""
        for reader in self._readers:
            reader.join(seconds)
        self._process.join(seconds)
        if any(reader.is_alive() for reader in self._readers) or self._process.is_alive():
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # the other ranks, too
            raise TimeoutError
        out, err = (reader.text for reader in self._readers)
        assert self._process.exitcode is not None
        return self._process.exitcode, out, err


class _Reader(threading.Thread):
    def __init__(self, pipe: Connection) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self._pipe = pipe
        self.start()

    def run(self) -> None:
        with self._pipe, open(self._pipe.fileno(), closefd=False) as file:
            self.text = file.read()


def _run(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    largest_file: int | None,
    out: Connection,
    err: Connection,
) -> None:
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, pipe in enumerate((out, err), start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    script, *arguments = command
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(script).parent), *filter(None, paths)]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
