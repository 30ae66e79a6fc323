"""What a sweep keeps in its folder: its plan, a note per job, and the marks that stop it.

The processes of a sweep may run on several machines, so they tell each other everything through
files here.
"""

import os
import signal
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import Field

from memfold.errors import InputError
from memfold.file_models import Model
from memfold.files import read_text, write_text_atomically
from memfold.runs.folder import JOB_NOTES

__all__ = ["JobNote", "SweepPlan", "find_note", "read_notes", "request_stop", "requested_stop"]

_SECONDS_OF_ROUNDING = 2.0  # in what psutil derives from the time of the boot


class SweepPlan(Model):
    """`sweep.json`: which jobs a sweep has, and who runs it."""

    command: str
    """As the user typed it."""
    arguments: list[str]
    """The command line after the program's name, without what belongs to one attempt."""
    jobs: list[list[str]] | None
    """The overrides of every job, by number; `None` when the sweeper decides as it goes."""
    attempt: int = Field(ge=1)
    """How often the sweep has been started, from 1."""
    host: str = Field(default_factory=socket.gethostname)
    pid: int = Field(default_factory=os.getpid, ge=1, lt=2**31)
    started: float = Field(default_factory=lambda: psutil.Process().create_time())
    """When the process `pid` was started, in seconds since 1970."""
    repeats: dict[str, int] = Field(default_factory=dict)
    """Number of a job that is not run -> number of the one before it that is the same run."""

    @property
    def is_alone(self) -> bool:
        """Whether the process that started the sweep was on this machine and has gone."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < _SECONDS_OF_ROUNDING
            return not is_same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class JobNote(Model):
    """How a job of a sweep goes, for the sweep's own process."""

    number: int
    folder: str
    """Relative to the sweep's."""
    overrides: list[str]
    attempt: int
    seconds: float | None = None
    """How long the job took; `None` while it runs."""

    def note(self, sweep: Path) -> None:
        """Write the note. A full disk costs the line about the job, not the job."""
        with suppress(InputError):
            self.write(sweep / JOB_NOTES / f"{self.number}.json")


def find_note(sweep: Path, number: int) -> JobNote | None:
    """Return the note on a job; `None` where there is none, or it is replaced at this moment."""
    return JobNote.find(sweep / JOB_NOTES / f"{number}.json")


def read_notes(sweep: Path, known: Collection[int] = ()) -> list[JobNote]:
    """Return the notes on all jobs that were started, but for the numbers in `known`."""
    numbers = {file.stem for file in (sweep / JOB_NOTES).glob("*.json")} - set(map(str, known))
    notes = [find_note(sweep, int(number)) for number in numbers if number.isdecimal()]
    return sorted((note for note in notes if note is not None), key=lambda note: note.number)


def request_stop(sweep: Path, attempt: int, number: signal.Signals) -> None:
    """Ask all processes of an attempt to send `number` to their jobs and to start no more.

    The mark stays: a job that waits in a cluster's queue may look at it days later.
    """
    write_text_atomically(_stop_mark(sweep, attempt), number.name)


def requested_stop(sweep: Path, attempt: int) -> signal.Signals | None:
    """Return the signal that the jobs of an attempt shall get; `None` if they may go on."""
    try:
        name = read_text(_stop_mark(sweep, attempt))
    except OSError:
        return None
    return signal.SIGINT if name == signal.SIGINT.name else signal.SIGTERM


def _stop_mark(sweep: Path, attempt: int) -> Path:
    return (sweep / JOB_NOTES).with_name(f"stop_{attempt}")
