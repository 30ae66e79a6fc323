"""What `train.py` makes of overrides, found out before anything is trained; experiment files."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from memfold.errors import InputError
from memfold.overrides import parse, quote_value
from memfold.studies.composing import compose_run, group_in_wandb
from memfold.studies.space import Setting, Space, Value
from memfold.training.user_errors import describe_error

__all__ = ["Configuration", "experiment_files", "origin", "search_path", "write_override"]

_GIVEN_BY_THE_STUDY = re.compile(r"seed|resume|hydra[./].*")
_EXPERIMENT = "experiment"
_NAME = re.compile(r"[A-Za-z_][\w-]*")


class Configuration:
    """The configuration of `train.py`, with the overrides that all trials share."""

    def __init__(self, conf: Path, common: Sequence[str], space: Space) -> None:
        """Check the overrides and every parameter of the space.

        Args:
            conf: Hydra's configuration folder.
            common: Overrides of all trials, as on the command line of `train.py`.
            space: What differs between trials.

        Raises:
            InputError: An override or parameter is unknown, given twice, or can be in no
                experiment file.
        """
        self._conf = conf
        self.common = tuple(common)
        try:
            _refuse_given_twice(parse(common), space)
        except HydraException as error:
            raise InputError(describe_error(error)) from error
        self._base = self._compose(self.common)
        self._groups = frozenset(self._base.hydra.runtime.choices)
        examples = {key: one.examples() for key, one in space.parameters.items()}
        for key in sorted(self._groups & examples.keys()):
            if None in examples[key]:
                raise InputError(f"parameters: {key}: null is no choice of a group; name one")
        first = {key: values[0] for key, values in examples.items()}
        self._refuse_unwritable(first, expected=self._compose_examples(first, examples))

    def group(self, study_name: str, *, job_type: str | None = "tune") -> list[str]:
        """Return the overrides that make a study one group in W&B; see `group_in_wandb`."""
        return group_in_wandb(self._base, study_name, job_type)

    def overrides(self, setting: Setting) -> list[str]:
        """Return the overrides of a trial: the common ones, then its own."""
        own = [write_override(k, v, is_group=k in self._groups) for k, v in setting.items()]
        return [*self.common, *own]

    def experiment(self, setting: Setting, head: Sequence[str]) -> str:
        """Write the common overrides and a setting as an experiment file.

        Args:
            setting: A value for each parameter.
            head: Lines of comment.
        """
        defaults: dict[str, Any] = {}
        values = OmegaConf.create()
        for override in parse(self.overrides(setting)):
            key, value = override.key_or_group, override.value()
            if key in self._groups:
                defaults[key] = value
            else:
                OmegaConf.update(values, key, value, merge=True, force_add=True)
        lines = ["# @package _global_", *(f"# {line}" for line in head)]
        if defaults:
            # Another experiment comes first: the choices below may change its own.
            base = defaults.pop(_EXPERIMENT, None)
            entries = ([] if base is None else [base]) + [
                {f"override /{group}": choice} for group, choice in defaults.items()
            ]
            text = OmegaConf.to_yaml(OmegaConf.create(entries))
            lines += ["defaults:", *(f"  {line}" for line in text.splitlines())]
        lines += ["", OmegaConf.to_yaml(values)] if values else [""]
        return "\n".join(lines)

    def compose_task(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Compose the configuration of a run; interpolations stay as they are."""
        task: Any = OmegaConf.to_container(self._compose(overrides))
        del task["hydra"]
        return task

    def _compose(self, overrides: Sequence[str], *, blame: str = "") -> DictConfig:
        try:
            return compose_run(self._conf, overrides, with_hydra=True)
        except InputError as error:
            place = f"parameters: {blame}: " if blame else ""
            # Of Hydra's errors, the bare ones do not name the override.
            if not blame and isinstance(error.__cause__, ValueError | TypeError):
                place = f"{' '.join(overrides)}: "
            raise InputError(f"{place}{error}") from error

    def _compose_examples(
        self, first: Setting, examples: Mapping[str, Sequence[Value]]
    ) -> dict[str, Any]:
        """Compose every value once, beside the first ones; return what those give."""
        try:
            composed = self.compose_task(self.overrides(first))
        except InputError:
            for key, value in first.items():
                self._compose(self.overrides({key: value}), blame=key)
            raise
        for key, values in examples.items():
            for value in values[1:]:
                self._compose(self.overrides(first | {key: value}), blame=key)
        return composed

    def _refuse_unwritable(self, setting: Setting, expected: dict[str, Any]) -> None:
        """Compose the experiment file of a setting, which must say the same as its overrides."""
        refusal = f"{' '.join(self.common)}: this cannot be written into an experiment file"
        with tempfile.TemporaryDirectory() as folder:
            name = Path(folder).name  # which no other experiment has
            file = Path(folder, _EXPERIMENT, f"{name}.yaml")
            file.parent.mkdir()
            file.write_text(self.experiment(setting, []), encoding="utf-8")
            try:
                found = self.compose_task([search_path(folder), f"{_EXPERIMENT}={name}"])
            except InputError as error:
                raise InputError(f"{refusal} ({error})") from error
        different = [key for key in expected | found if expected.get(key) != found.get(key)]
        if different:
            raise InputError(f"{refusal} (it gives another {different[0]})")


def experiment_files(conf: Path, study: Path, in_conf: str | None) -> dict[Path, list[str]]:
    """Return where the best setting is written, and with which arguments `train.py` finds it there.

    The first is in the study folder.

    Args:
        conf: Hydra's configuration folder.
        study: The study folder, as the user wrote it.
        in_conf: The name of an experiment in `conf`, too, if wanted.

    Raises:
        InputError: A name is not allowed, or that of a file of anybody else.
    """
    name = re.sub(r"[^\w-]", "_", study.resolve().name)
    file = conf / _EXPERIMENT / f"{name}.yaml"
    if _is_taken(file, study):
        raise InputError(
            f"--study {study}: its experiment file could not be told from "
            f"{file}; choose another name for the folder"
        )
    own = study.resolve() / _EXPERIMENT / file.name
    files = {own: ["--config-dir", str(study), f"{_EXPERIMENT}={name}"]}
    if in_conf is not None:
        file = conf / _EXPERIMENT / f"{in_conf}.yaml"
        if not _NAME.fullmatch(in_conf):
            raise InputError(f"--write-experiment {in_conf}: letters, digits, _ and - only")
        if _is_taken(file, study):
            raise InputError(
                f"--write-experiment {in_conf}: {file} exists and is not of this "
                "study; choose another name"
            )
        files[file] = [f"{_EXPERIMENT}={in_conf}"]
    return files


def origin(study: Path) -> str:
    """Return the line by which an experiment file is known to be of a study."""
    return f"Tuned in the study {study.resolve().name}"


def _is_taken(file: Path, study: Path) -> bool:
    return file.exists() and f"# {origin(study)}" not in file.read_text("utf-8").splitlines()


def search_path(folder: str) -> str:
    """Return the override that lets Hydra find configurations in `folder`, too."""
    return f"hydra.searchpath=[{quote_value(f'file://{folder}')}]"


def write_override(key: str, value: object, *, is_group: bool = False) -> str:
    """Write `key=value` so that Hydra reads back the same value."""
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str) and not is_group:
        return f"{key}={quote_value(value)}"
    return f"{key}={value}"


def _refuse_given_twice(common: Sequence[Override], space: Space) -> None:
    for override in common:
        key, text = override.key_or_group, override.input_line
        if _GIVEN_BY_THE_STUDY.fullmatch(key):
            raise InputError(f"{text}: the study gives every run its {key}")
        if key in space.parameters:
            raise InputError(f"{text}: {key} is a parameter of the search space")
        if override.is_sweep_override():
            raise InputError(f"{text}: one value; what varies is in the space")
        if override.is_delete():
            raise InputError(f"{text}: an experiment file cannot delete a key; set it to null")
    for key in space.parameters:
        if _GIVEN_BY_THE_STUDY.fullmatch(key):
            raise InputError(f"parameters: {key} is given by the study, and cannot be tuned")
