"""What the command lines of all studies have in common."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from memfold.errors import InputError
from memfold.studies.executor import Stopped, StopSignal

__all__ = ["ending_in_one_line", "positive_integer", "split_overrides"]


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
