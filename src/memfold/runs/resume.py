"""Continue a run: its overrides, before Hydra starts."""

import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.types import Override

from memfold.errors import InputError
from memfold.overrides import GROUPS, folder_override, path_of, quote_value, split, texts_of
from memfold.runs.folder import refuse_odd_files
from memfold.runs.recorded import is_setting, read_overrides

__all__ = ["expand_arguments", "refuse_other_folder", "resume_command"]


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Add to a command line with `resume=RUN` what the run was started with.

    Flags come first in the result, which saves the user from Hydra's refusal of a flag that
    stands between two overrides.

    The run's own overrides come first, without those that are given anew; those that could do more
    than set a value must be, for the folder may be somebody else's. Expanding twice gives
    the same as expanding once, because Lightning starts its child processes with the expanded
    command line, which goes through here again.

    Args:
        arguments: The command line after the program's name.

    Raises:
        InputError: `resume` does not name one run folder, the folder would decide which code runs
            or where it writes, or a group is null.
        OverrideParseException: Hydra cannot read an override.
    """
    flags, given = split(arguments)
    given_texts = texts_of(given)
    for override in given:  # Hydra answers null with a traceback
        is_null = override.value() is None and not override.is_delete()
        if is_null and override.key_or_group in GROUPS:
            raise InputError(
                f"{override.input_line}: one of the choices that --help lists is needed"
            )
    folder = _run_folder(given, in_sweep="-m" in arguments or "--multirun" in arguments)
    if folder is None:
        return [*flags, *given_texts]
    try:
        original = read_overrides(folder)
    except InputError as error:
        raise InputError(f"resume={folder} is no run folder: {error}") from error
    refuse_odd_files(folder)
    kept = [override for override in original if not _is_given_anew(override, given)]
    unsafe = texts_of(override for override in kept if not is_setting(override))
    if unsafe:
        raise InputError(
            f"resume={folder}: a run folder may neither name code nor places outside of it, but "
            f"it was started with {', '.join(unsafe)}; if you trust that, give it again: "
            f"{shlex.join(unsafe)}"
        )
    # The folder's own .hydra stays until the checkpoint has been accepted (see training.job).
    extra = [f"hydra.run.dir={quote_value(str(folder))}", "hydra.output_subdir=null"]
    extra = [text for text in extra if text not in given_texts]
    return [*flags, *texts_of(kept), *given_texts, *extra]


def resume_command(folder: Path) -> str:
    """Return what to type, in a shell, to go on with the run in `folder`."""
    again: list[str] = []
    with suppress(InputError):
        again = texts_of(o for o in read_overrides(folder) if not is_setting(o))
    return shlex.join(["python", "train.py", folder_override("resume", folder), *again])


def _run_folder(given: Sequence[Override], *, in_sweep: bool) -> Path | None:
    values = [override for override in given if override.key_or_group == "resume"]
    if not values or values[-1].value() is None:
        return None
    resume = values[-1]
    if in_sweep or resume.is_sweep_override():
        raise InputError(f"{resume.input_line}: one run is resumed at a time, without -m")
    folder = path_of(resume)
    if not folder.is_dir():
        raise InputError(f"resume={folder}: there is no such folder; give that of an earlier run")
    refuse_other_folder(f"resume={folder}", folder, "hydra.run.dir", given)
    return folder


def refuse_other_folder(resume: str, folder: Path, key: str, given: Iterable[Override]) -> None:
    """Check that a command line that goes on in a folder does not name another one, too.

    Args:
        resume: What asks for it, for the message.
        folder: The folder.
        key: Of an override that names a folder to begin in.
        given: All overrides.

    Raises:
        InputError: It does.
    """
    for other in (path_of(override) for override in given if override.key_or_group == key):
        if not other.is_dir() or not other.samefile(folder):
            raise InputError(f"{resume} continues in that folder; {key}={other} is another")


def _is_given_anew(original: Override, given: Sequence[Override]) -> bool:
    """Tell whether `original` has to give way; `+key=1` stays, for a later `key=2` needs it."""
    if original.key_or_group == "resume":
        return True
    same = [g for g in given if g.key_or_group == original.key_or_group]
    if original.is_add() and "." in original.key_or_group:
        same = [g for g in same if g.is_add()]
    return bool(same)
