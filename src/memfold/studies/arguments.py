"""What the command lines of all studies have in common."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from memfold.errors import InputError
from memfold.files import make_folder
from memfold.runs.locks import locked
from memfold.studies.process import Stopped, StopSignal

__all__ = [
    "add_jobs",
    "command_parser",
    "ending_in_one_line",
    "positive_integer",
    "split_overrides",
    "working_in",
]


def command_parser(
    description: str, epilog: str | None = None, usage: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser that takes no shortened options and prints the epilog as it stands."""
    return argparse.ArgumentParser(
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add `--jobs N`: how many runs at a time, by default one per core."""
    parser.add_argument(
        "--jobs",
        type=positive_integer,
        default=psutil.cpu_count(logical=False) or 1,
        metavar="N",
        help="runs at a time; cores and GPUs are divided (default: one per core)",
    )


def positive_integer(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line at `--`, after which overrides of `train.py` stand."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


@contextmanager
def working_in(folder: Path, stop: StopSignal) -> Iterator[None]:
    """Make the folder of a study, keep other processes out of it, and note signals in `stop`.

    Raises:
        InputError: It is in use by another process, or cannot be written.
    """
    make_folder(folder)
    with stop.caught(), locked(folder):
        yield


def ending_in_one_line(
    body: Callable[[StopSignal], int], stopped: str = "interrupted; the same command goes on"
) -> int:
    """Call the body of a command, and return its exit status.

    Args:
        body: Gets the signal that is to end it.
        stopped: What to say after Ctrl-C or SIGTERM.

    Returns:
        What the body returns, 1 after a user's mistake, 128 + the signal after Ctrl-C or SIGTERM;
        both with one line on stderr.
    """
    stop = StopSignal()
    try:
        return body(stop)
    except (Stopped, KeyboardInterrupt):
        print(stopped, file=sys.stderr)
        return 128 + (stop.number or signal.SIGINT)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
