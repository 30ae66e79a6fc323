"""`sweep.resume=FOLDER`: the command line of the sweep in that folder, before Hydra starts."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from memfold.errors import InputError
from memfold.overrides import folder_override, is_override, quote_value
from memfold.runs.recorded import is_setting
from memfold.studies.sweep_folder import PLAN, Plan

__all__ = ["expand_sweep_arguments", "lasting_arguments", "resume_arguments"]

_RESUME = "sweep.resume"
_FOLDER = "hydra.sweep.dir"
_CALLBACK = "hydra.callbacks.sweep"
_MULTIRUN = ("-m", "--multirun")
_LAUNCHER = ("hydra/launcher", "hydra.launcher")
_SUBDIR = re.compile(r"(?!/|.*\.\.)([\w=,./-]|\$\{(hydra:)?[A-Za-z]\w*(\.\w+)*\})+")
_WORDS = (
    "hydra/launcher",
    "hydra/sweeper",
    *(f"hydra.launcher.{key}" for key in ("partition", "account", "qos", "constraint", "gres")),
)
# Of Hydra's own keys, these decide which jobs there are, and in which folders.
_DECIDES_JOBS = ("hydra/sweeper", "hydra.sweeper", "hydra.sweep.subdir")


def expand_sweep_arguments(arguments: Sequence[str]) -> list[str]:
    """Put in the place of `sweep.resume=FOLDER` what that sweep was started with.

    What decides its jobs may be said again, and must be where it does more than set values: the
    folder may be somebody else's. The launcher may be another one.

    Args:
        arguments: The command line after the program's name.

    Raises:
        InputError: There is no sweep in the folder, it was another one, or the folder would decide
            which code runs.
        OverrideParseException: Hydra cannot read an override.
    """
    if not any(text.partition("=")[0] == _RESUME for text in arguments):
        return list(arguments)
    flags, given = _split(arguments)
    resume = [override for override in given if override.key_or_group == _RESUME][-1]
    given = [override for override in given if override.key_or_group != _RESUME]
    if resume.value() is None:
        return [*flags, *_texts(given)]
    is_sweep = any(flag in flags for flag in _MULTIRUN) or "hydra.mode=MULTIRUN" in arguments
    if not is_sweep or resume.is_sweep_override():
        raise InputError(
            f"{resume.input_line} continues a sweep: python train.py -m {_RESUME}=FOLDER"
        )
    folder = Path(str(resume.value()).replace(r"\${", "${"))
    try:
        plan = Plan.read(folder / PLAN)
    except FileNotFoundError as error:
        raise InputError(f"{_RESUME}={folder} is no folder of a sweep: it has no {PLAN}") from error
    except InputError as error:
        raise InputError(
            f"{_RESUME}={folder}: {error}; start the sweep again in another folder: "
            f"{_FOLDER}=FOLDER"
        ) from error
    _refuse_other_folder(folder, given)
    again = [*flags, *_texts([override for override in given if _decides_jobs(override)])]
    other = [text for text in again if text not in (*plan.arguments, *_MULTIRUN)]
    if other:
        raise InputError(
            f"{_RESUME}={folder}: that sweep was started without {' '.join(other)}; a resumed "
            "sweep keeps its jobs: leave that out, or start a new sweep"
        )
    old_flags, before = _split(plan.arguments)
    anew = [o for o in given if not _decides_jobs(o) and o.key_or_group != _FOLDER]
    is_moved = any(override.key_or_group.startswith(_LAUNCHER) for override in anew)
    given_anew = {override.key_or_group for override in anew}
    kept = [
        override
        for override in before
        if not (is_moved and override.key_or_group.startswith(_LAUNCHER))
        and override.key_or_group not in given_anew
    ]
    unsafe = [text for text in _unsafe(old_flags, kept) if text not in again]
    if unsafe:
        raise InputError(
            f"{_RESUME}={folder}: a sweep's folder may neither name code nor places outside of it, "
            f"but it was started with {', '.join(unsafe)}; if you trust that, give it again: "
            f"{shlex.join(resume_arguments(folder))}"
        )
    return [
        *old_flags,
        *_texts(kept),
        *_texts(anew),
        f"{_FOLDER}={quote_value(str(folder))}",
        f"{_CALLBACK}.resume=true",
    ]


def lasting_arguments(arguments: Sequence[str]) -> list[str]:
    """Leave out of an expanded command line what belongs to one attempt at the sweep."""
    return [text for text in arguments if not text.startswith((f"{_FOLDER}=", f"{_CALLBACK}."))]


def resume_arguments(folder: Path) -> list[str]:
    """Return what to type after the program's name to go on with the sweep in `folder`."""
    plan = Plan.find(folder / PLAN)
    again: list[str] = []
    with suppress(OverrideParseException):
        if plan is not None:
            again = _unsafe(*_split(plan.arguments))
    return ["-m", folder_override(_RESUME, folder), *again]


def _unsafe(flags: Sequence[str], overrides: Sequence[Override]) -> list[str]:
    """Return what could run code, or write elsewhere, if somebody else wrote it."""
    unsafe = [flag for flag in flags if flag not in _MULTIRUN]
    return [*unsafe, *_texts([o for o in overrides if not (_is_of_sweep(o) or is_setting(o))])]


def _is_of_sweep(override: Override) -> bool:
    """Tell whether an override only chooses a launcher and its limits, or names the jobs."""
    key, value = override.key_or_group, override.value()
    if key == "hydra.sweep.subdir":
        return _SUBDIR.fullmatch(str(value)) is not None
    if not key.startswith(_LAUNCHER) and key != "hydra/sweeper":
        return False
    is_number = isinstance(value, bool | int | float) or value is None
    is_word = isinstance(value, str) and re.fullmatch(r"[\w.:@-]+", value) is not None
    return (is_number and not key.startswith("hydra.launcher._")) or (is_word and key in _WORDS)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    texts = [text for text in arguments if is_override(text)]
    flags = [text for text in arguments if not is_override(text)]
    return flags, OverridesParser.create().parse_overrides(texts)


def _texts(overrides: Sequence[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _decides_jobs(override: Override) -> bool:
    key = override.key_or_group
    return not key.startswith(("hydra.", "hydra/")) or key.startswith(_DECIDES_JOBS)


def _refuse_other_folder(folder: Path, given: Sequence[Override]) -> None:
    for override in given:
        if override.key_or_group == _FOLDER:
            other = Path(str(override.value()))
            if not other.is_dir() or not other.samefile(folder):
                raise InputError(
                    f"{_RESUME}={folder} continues in that folder; {_FOLDER}={other} is another"
                )
