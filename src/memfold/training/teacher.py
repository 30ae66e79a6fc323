"""The teacher of a distilled run: the artifact of a completed run on the same data."""

import hashlib
from pathlib import Path
from typing import Any

import memfold
from memfold.errors import InputError
from memfold.files import open_regular
from memfold.runs.folder import ARTIFACT, read_result
from memfold.runs.recorded import read_config
from memfold.tasks import Task
from memfold.tasks.distillation import Distillation
from memfold.training.checkpoint_reading import StartingPoint
from memfold.training.foreign_code import named_code, refuse_foreign_code
from memfold.training.networks import build_backbone

__all__ = ["describe_distillation", "load_distillation", "refuse_other_teacher"]


def load_distillation(config: dict[str, Any], task: Task) -> Distillation | None:
    """Load the teacher that `distill` names, as a plain dense network.

    Building it draws from the global generators.

    Args:
        config: The resolved configuration of the run, plain values.
        task: What the run learns, of which data.

    Returns:
        `None` when `distill.teacher` is null.

    Raises:
        InputError: The folder holds no completed run, its artifact cannot be read, it was trained
            for something else, or it names code that is neither memfold's nor named by `config`.
    """
    options = config["distill"]
    if options["teacher"] is None:
        return None
    folder = Path(options["teacher"]).expanduser()
    key = f"distill.teacher={options['teacher']}"
    _check_completed(folder, key)
    try:
        trained = read_config(folder, ("backbone", "data._target_"))
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    facts = {
        "data": (trained["data._target_"], config["data"]["_target_"]),
        "task": (read_result(folder).get("task"), task.name),
    }
    for group, (found, expected) in facts.items():
        if found != expected:
            raise InputError(
                f"{key} is a teacher of another task: its {group} is {found}, "
                f"that of this run {expected}"
            )
    allowed = named_code(config) | set(options["allow"])
    try:
        refuse_foreign_code(trained, allowed, "'distill.allow=[{}]'")
        net = build_backbone(trained["backbone"], task.spec)
        memfold.load(folder / ARTIFACT, net)
    except InputError as error:
        raise InputError(f"{key} cannot be loaded: {error}") from error
    with open_regular(folder / ARTIFACT) as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return Distillation(
        memfold.densify(net),
        temperature=options["temperature"],
        weight=options["weight"],
        fingerprint=fingerprint,
    )


def describe_distillation(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `result.json` says of a run's teacher; `None` when it has none."""
    options = config["distill"]
    if options["teacher"] is None:
        return None
    result = read_result(Path(options["teacher"]).expanduser())
    facts = {key: result.get(key) for key in ("backbone", "compression", "seed", "metrics")}
    return {**options, "teacher": {"run": options["teacher"], **facts}}


def refuse_other_teacher(
    config: dict[str, Any], start: StartingPoint, distillation: Distillation | None
) -> None:
    """Check that a resumed run keeps its teacher, wherever its folder is now.

    Raises:
        InputError: The checkpoint is of a run with another teacher.
    """
    fingerprint = None if distillation is None else distillation.fingerprint
    if start.checkpoint is not None and start.teacher != fingerprint:
        before = "none" if start.teacher is None else "another"
        raise InputError(
            f"resume={config['resume']}: distill.teacher={config['distill']['teacher']} is not the "
            f"teacher of that run, which had {before}; a resumed run keeps it"
        )


def _check_completed(folder: Path, key: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{key}: there is no such folder; give that of a completed run")
    result = read_result(folder)
    if not result:
        raise InputError(f"{key} is no run folder: it has no result.json that can be read")
    if result.get("status") != "completed":
        raise InputError(
            f"{key}: the run is not completed ({result.get('error', 'no reason given')})"
        )
