"""The kernel's lock on an open file, which is opened when its holder is killed."""

import fcntl
from typing import IO, Any

__all__ = ["take_lock"]


def take_lock(file: IO[Any], *, waits: bool) -> bool:
    """Lock an open file until it is closed, and return whether that was possible.

    Args:
        file: An open file.
        waits: Whether to wait for whoever has the lock.

    Raises:
        OSError: Its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
