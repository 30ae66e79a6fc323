"""The tuned setting as an experiment file, in the study and in the repository."""

import re
from pathlib import Path

from memfold.errors import InputError
from memfold.runs.folder import write_text_atomically, writing
from memfold.tuning.configuration import Configuration
from memfold.tuning.study import Study, Trial

__all__ = ["ExperimentFiles"]

_FOLDER = "experiment"
_NAME = re.compile(r"[A-Za-z_][\w-]*")


class ExperimentFiles:
    """Where the setting is written: `STUDY/experiment/`, and `conf/experiment/` if wanted."""

    def __init__(self, conf: Path, study: Path, in_conf: str | None) -> None:
        """Check that no file of anybody else is in the way.

        Args:
            conf: Hydra's configuration folder.
            study: The study folder, as the user wrote it.
            in_conf: The name of an experiment in `conf`; `None`: only in the study folder.

        Raises:
            InputError: A name is not allowed or taken.
        """
        self._study = study
        self._mark = f"# Tuned in the study {study.resolve().name}"
        self.name = re.sub(r"[^\w-]", "_", study.resolve().name)
        """Of the experiment in the study folder."""
        self._in_conf = None
        if self._is_taken(conf / _FOLDER / f"{self.name}.yaml"):
            raise InputError(
                f"--study {study}: its experiment file could not be told from "
                f"{conf / _FOLDER / self.name}.yaml; choose another name for the folder"
            )
        if in_conf is not None:
            self._in_conf = conf / _FOLDER / f"{in_conf}.yaml"
            if not _NAME.fullmatch(in_conf):
                raise InputError(f"--write-experiment {in_conf}: letters, digits, _ and - only")
            if self._is_taken(self._in_conf):
                raise InputError(
                    f"--write-experiment {in_conf}: {self._in_conf} exists and is not of this "
                    "study; choose another name"
                )

    @property
    def arguments(self) -> list[str]:
        """What makes `train.py` use the experiment."""
        return ["--config-dir", str(self._study), f"{_FOLDER}={self.name}"]

    def write(self, study: Study, configuration: Configuration, best: Trial) -> list[Path]:
        """Write the files; return where they are.

        Raises:
            InputError: A file cannot be written.
        """
        seeds, metric = ", ".join(map(str, study.space.tuning_seeds)), study.space.metric
        facts = [
            self._mark.removeprefix("# "),
            f"{metric} {best.value:.4f}, the mean of seeds {seeds}; trial {best.number}",
        ]
        inside = study.folder / _FOLDER / f"{self.name}.yaml"
        commands = {inside: " ".join(self.arguments)}
        if self._in_conf is not None:
            commands[self._in_conf] = f"{_FOLDER}={self._in_conf.stem}"
        for file, arguments in commands.items():
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            head = [*facts, f"python train.py {arguments} seed=1"]
            write_text_atomically(file, configuration.experiment(best.setting, head))
        return list(commands)

    def _is_taken(self, file: Path) -> bool:
        return file.exists() and self._mark not in file.read_text(encoding="utf-8").splitlines()
