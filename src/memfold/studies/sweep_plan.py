"""Which jobs a sweep has, and whether it may begin: everything that is known before the first.

`sweep.resume=FOLDER` stands for the command line of the sweep in that folder, and is replaced by it
before Hydra starts.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.compression import Strategy
from memfold.errors import InputError
from memfold.overrides import folder_override, path_of, quote_value, split, texts_of, unresolved
from memfold.runs.folder import LOCK, RESULT, SWEEP_PLAN, refuse_used_folder
from memfold.runs.locks import locked
from memfold.runs.recorded import is_setting
from memfold.runs.resume import refuse_other_folder
from memfold.runs.sweep import SweepPlan, read_notes, request_stop

__all__ = ["admit", "expand_sweep_arguments", "resume_arguments", "sweep_folder"]

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


def sweep_folder(config: DictConfig) -> Path:
    """Return `hydra.sweep.dir`.

    Raises:
        InputError: It needs what only the jobs know.
    """
    try:
        return Path(os.path.abspath(config.hydra.sweep.dir))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{_FOLDER} must be the same for all jobs: {reason}") from error


def admit(config: DictConfig, folder: Path, *, resume: bool) -> SweepPlan:
    """Return the plan of this attempt, unless it would spoil what is in the folder.

    Args:
        config: The composed configuration, with Hydra's.
        folder: The sweep's.
        resume: Whether to go on with the sweep that is in the folder.

    Raises:
        InputError: The folder holds another sweep, a job in it still runs, or there is no job.
    """
    jobs = _planned_jobs(config)
    before = SweepPlan.find(folder / SWEEP_PLAN) if resume else None
    if before is None:
        _refuse_used(folder)
    elif before.jobs != jobs:
        raise InputError(
            f"sweep.resume={folder}: the same overrides now give other jobs than {SWEEP_PLAN} "
            "lists; start a new sweep"
        )
    for job in (file.parent for file in folder.rglob(LOCK)):
        if job != folder:
            with locked(job):  # not while somebody else runs it
                pass
    if before is not None:  # its jobs may still wait in a queue
        request_stop(folder, before.attempt, signal.SIGTERM)
    return SweepPlan(
        command=shlex.join(["python", *sys.argv]) if before is None else before.command,
        # What a resumed sweep is given besides, such as another launcher, is for this time.
        arguments=_lasting(sys.argv[1:]) if before is None else before.arguments,
        jobs=jobs,
        attempt=1 if before is None else before.attempt + 1,
        repeats=_repeats(config, jobs or [], {note.number for note in read_notes(folder)}),
    )


def resume_arguments(folder: Path) -> list[str]:
    """Return what to type after the program's name to go on with the sweep in `folder`."""
    plan = SweepPlan.find(folder / SWEEP_PLAN)
    again: list[str] = []
    with suppress(OverrideParseException):
        if plan is not None:
            again = _unsafe(*split(plan.arguments))
    return ["-m", folder_override(_RESUME, folder), *again]


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
    flags, given = split(arguments)
    resume = [override for override in given if override.key_or_group == _RESUME][-1]
    given = [override for override in given if override.key_or_group != _RESUME]
    if resume.value() is None:
        return [*flags, *texts_of(given)]
    is_sweep = any(flag in flags for flag in _MULTIRUN) or "hydra.mode=MULTIRUN" in arguments
    if not is_sweep or resume.is_sweep_override():
        raise InputError(
            f"{resume.input_line} continues a sweep: python train.py -m {_RESUME}=FOLDER"
        )
    folder = path_of(resume)
    try:
        plan = SweepPlan.read(folder / SWEEP_PLAN)
    except FileNotFoundError as error:
        raise InputError(
            f"{_RESUME}={folder} is no folder of a sweep: it has no {SWEEP_PLAN}"
        ) from error
    except InputError as error:
        raise InputError(
            f"{_RESUME}={folder}: {error}; start the sweep again in another folder: "
            f"{_FOLDER}=FOLDER"
        ) from error
    refuse_other_folder(f"{_RESUME}={folder}", folder, _FOLDER, given)
    again = [*flags, *texts_of([override for override in given if _decides_jobs(override)])]
    other = [text for text in again if text not in (*plan.arguments, *_MULTIRUN)]
    if other:
        raise InputError(
            f"{_RESUME}={folder}: that sweep was started without {' '.join(other)}; a resumed "
            "sweep keeps its jobs: leave that out, or start a new sweep"
        )
    old_flags, before = split(plan.arguments)
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
        *texts_of(kept),
        *texts_of(anew),
        f"{_FOLDER}={quote_value(str(folder))}",
        f"{_CALLBACK}.resume=true",
    ]


def _planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """Return the overrides of all jobs, or `None` if the sweeper makes them up as it goes."""
    target = str(OmegaConf.select(config, "hydra.sweeper._target_"))
    if not target.endswith(f".{BasicSweeper.__name__}"):
        return None
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    try:
        loader = GlobalHydra.instance().config_loader()  # for glob(*)
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*params, *unresolved(config.hydra.overrides.task)])
        jobs = BasicSweeper.split_arguments(overrides, None)[0]
    except HydraException:  # the sweeper will say it
        return None
    if not jobs:
        swept = [str(o.input_line) for o in overrides if o.is_sweep_override()]
        raise InputError(f"{' '.join(swept)}: there is no such value, hence no job")
    return jobs


def _repeats(
    config: DictConfig, jobs: Sequence[list[str]], started: Collection[int]
) -> dict[str, int]:
    """Find the jobs that differ from an earlier one in a ratio which their strategy ignores.

    Args:
        config: The composed configuration, with Hydra's.
        jobs: The overrides of every job, by number.
        started: Numbers of jobs that have left something, and go on.
    """
    first: dict[tuple[str, ...], int] = {}
    has_one: dict[tuple[str, ...], bool] = {}
    repeats = {}
    for number, overrides in enumerate(jobs):
        others = _without(overrides, "ratio", "budget_bytes")
        earlier = first.setdefault(others, number)
        if earlier == number or number in started:
            continue
        choice = _without(others, "seed")  # composing takes 0.1 s
        if choice not in has_one:
            has_one[choice] = _has_one_ratio(config, choice)
        if has_one[choice]:
            repeats[str(number)] = earlier
    return repeats


def _without(overrides: Sequence[str], *keys: str) -> tuple[str, ...]:
    return tuple(text for text in overrides if text.lstrip("+").partition("=")[0] not in keys)


def _has_one_ratio(config: DictConfig, overrides: Sequence[str]) -> bool:
    loader = GlobalHydra.instance().config_loader()
    try:
        job = loader.load_sweep_config(config, list(overrides))
        strategy = hydra.utils.get_class(str(OmegaConf.select(job, "compression._target_")))
    except (HydraException, OmegaConfBaseException, ImportError, ValueError):
        return False  # the job will say it
    return issubclass(strategy, Strategy) and strategy.ratios == "one"


def _refuse_used(folder: Path) -> None:
    if read_notes(folder):
        if SweepPlan.find(folder / SWEEP_PLAN) is None:
            raise InputError(
                f"{_FOLDER}={folder} holds a sweep whose {SWEEP_PLAN} is missing or damaged; "
                "choose another folder"
            )
        again = shlex.join(resume_arguments(folder))
        raise InputError(
            f"{_FOLDER}={folder} holds a sweep; run what is missing in it with "
            f"{again}, or choose another folder"
        )
    for file in folder.rglob(RESULT):
        refuse_used_folder(file.parent, _FOLDER)


def _lasting(arguments: Sequence[str]) -> list[str]:
    """Leave out of an expanded command line what belongs to one attempt at the sweep."""
    return [text for text in arguments if not text.startswith((f"{_FOLDER}=", f"{_CALLBACK}."))]


def _unsafe(flags: Sequence[str], overrides: Sequence[Override]) -> list[str]:
    """Return what could run code, or write elsewhere, if somebody else wrote it."""
    unsafe = [flag for flag in flags if flag not in _MULTIRUN]
    return [*unsafe, *texts_of([o for o in overrides if not (_is_of_sweep(o) or is_setting(o))])]


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


def _decides_jobs(override: Override) -> bool:
    key = override.key_or_group
    return not key.startswith(("hydra.", "hydra/")) or key.startswith(_DECIDES_JOBS)
