"""Overrides that Hydra would answer with a traceback, or take and leave a run that is not whole."""

from collections.abc import Sequence

from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

from memfold.errors import InputError
from memfold.overrides import GROUPS, is_override, parse
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import HYDRA_FOLDER

__all__ = ["refuse_wrong_arguments"]

_OPTIONAL_GROUPS = ("experiment", "debug")
_LONGEST_QUOTE = 80


def refuse_wrong_arguments(arguments: Sequence[str]) -> None:
    """Check the choices of groups, and those of Hydra's own keys that a run folder depends on.

    Args:
        arguments: The command line after the program's name, as the user has typed it.

    Raises:
        InputError: A value is not allowed, or cannot be read.
        OverrideParseException: Hydra cannot read an override.
    """
    texts = [text for text in arguments if is_override(text)]
    overrides: list[Override] = []
    for text in texts:
        try:
            overrides += parse([text])
        except (ValueError, RecursionError) as error:  # thousands of digits or brackets
            short = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
            raise InputError(f"{short} cannot be read: it is too long or too deep") from error
    is_resumed = any(override.key_or_group == "resume" for override in overrides)
    for override in overrides:
        key, text = override.key_or_group, str(override.input_line)
        if override.is_delete():
            continue
        value = override.value()
        if key in (*GROUPS, *_OPTIONAL_GROUPS) or key.startswith("hydra/"):
            choices = value.list if isinstance(value, ChoiceSweep) else [value]
            if not all(isinstance(choice, str | QuotedString) for choice in choices):
                none = f"; ~{key} for none" if key in _OPTIONAL_GROUPS else ""
                raise InputError(f"{text}: one of the choices that --help lists is needed{none}")
        # The other ranks of a run are started without.
        elif key == "hydra.output_subdir" and is_rank_zero() and not is_resumed:
            if value != HYDRA_FOLDER:
                raise InputError(f"{text}: a run is resumed from its {HYDRA_FOLDER}; leave it out")
        elif key == "hydra.job.name" and "/" in str(value):
            raise InputError(f"{text}: the name of a file, without /")
