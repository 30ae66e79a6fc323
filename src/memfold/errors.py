"""The one exception for what a user can put right."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A mistake in what the user asked for or supplied.

    The message is one line that names the key or file, the value found, and what is allowed.
    The command line prints it without a traceback and exits with status 1.
    """
