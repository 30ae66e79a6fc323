"""Which jobs a sweep has, and whether it may begin: everything that is known before the first."""

import os
import shlex
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.compression import Strategy
from memfold.errors import InputError
from memfold.overrides import unresolved
from memfold.runs.folder import LOCK, RESULT, refuse_used_folder
from memfold.runs.locks import locked
from memfold.studies.composing import composed_job
from memfold.studies.sweep_arguments import lasting_arguments, resume_arguments
from memfold.studies.sweep_folder import PLAN, Plan, read_notes, request_stop

__all__ = ["admit", "sweep_folder"]

_FOLDER = "hydra.sweep.dir"
_NUMBER = "${hydra.job.num}"


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


def admit(config: DictConfig, folder: Path, *, resume: bool) -> Plan:
    """Return the plan of this attempt, unless it would spoil what is in the folder.

    Args:
        config: The composed configuration, with Hydra's.
        folder: The sweep's.
        resume: Whether to go on with the sweep that is in the folder.

    Raises:
        InputError: The folder holds another sweep, a job in it still runs, there is no job, or
            two jobs have one folder.
    """
    jobs = _planned_jobs(config)
    before = Plan.find(folder / PLAN) if resume else None
    if before is None:
        _refuse_used(folder)
    elif before.jobs != jobs:
        raise InputError(
            f"sweep.resume={folder}: the same overrides now give other jobs than {PLAN} lists; "
            "start a new sweep"
        )
    _refuse_common_folders(config, jobs or [])
    for job in (file.parent for file in folder.rglob(LOCK)):
        if job != folder:
            with locked(job):  # not while somebody else runs it
                pass
    if before is not None:  # its jobs may still wait in a queue
        request_stop(folder, before.attempt, signal.SIGTERM)
    return Plan(
        command=shlex.join(["python", *sys.argv]) if before is None else before.command,
        # What a resumed sweep is given besides, such as another launcher, is for this time.
        arguments=lasting_arguments(sys.argv[1:]) if before is None else before.arguments,
        jobs=jobs,
        attempt=1 if before is None else before.attempt + 1,
        repeats=_repeats(config, jobs or [], {note.number for note in read_notes(folder)}),
    )


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


def _refuse_common_folders(config: DictConfig, jobs: Sequence[list[str]]) -> None:
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(sweep, dict)
    subdir = str(sweep["subdir"])
    # Composing takes 0.1 s per job. What is left is found when the second job comes to its folder.
    if any(number in subdir for number in (_NUMBER, "${hydra:job.num}")):
        return
    first: dict[str, int] = {}
    try:
        for number, overrides in enumerate(jobs):
            with composed_job(config, number, overrides) as job:
                folder = os.path.normpath(str(job.hydra.sweep.subdir))
            if folder in first:
                raise InputError(
                    f"hydra.sweep.subdir={subdir} gives jobs {first[folder]} and {number} one "
                    f"folder, {folder}; name each swept key in it, or {_NUMBER}"
                )
            first[folder] = number
    except (HydraException, OmegaConfBaseException):  # the sweeper or the job will say it
        return


def _refuse_used(folder: Path) -> None:
    if read_notes(folder):
        if Plan.find(folder / PLAN) is None:
            raise InputError(
                f"{_FOLDER}={folder} holds a sweep whose {PLAN} is missing or damaged; "
                "choose another folder"
            )
        again = shlex.join(resume_arguments(folder))
        raise InputError(
            f"{_FOLDER}={folder} holds a sweep; run what is missing in it with "
            f"{again}, or choose another folder"
        )
    for file in folder.rglob(RESULT):
        refuse_used_folder(file.parent, _FOLDER)
