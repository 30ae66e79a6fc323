"""Where metrics go: `metrics.csv` always, and what `logger=` names."""

import csv
import io
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from memfold.errors import InputError
from memfold.files import read_text, write_text_atomically, writing
from memfold.runs.folder import METRICS

__all__ = [
    "ContinuedSteps",
    "MetricsFile",
    "no_further_logger",
    "tensorboard_logger",
]


class ContinuedSteps(Logger):
    """What logs all rounds of a run: its axis is the optimizer steps of all of them."""

    earlier_steps = 0
    """What to add to the step of the round that is trained."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log at the step of the whole run."""
        step = None if step is None else step + self.earlier_steps
        super().log_metrics(metrics, step)  # pyright: ignore[reportAbstractUsage]

    def conclude(self, result: Mapping[str, Any], artifact: Path) -> None:
        """Log what a completed run has beside its metrics: nothing, where a logger has no place.

        Args:
            result: As in `result.json`.
            artifact: The file.
        """


class _TensorBoardFiles(ContinuedSteps, TensorBoardLogger):
    @rank_zero_only
    def conclude(self, result: Mapping[str, Any], artifact: Path) -> None:
        """Log the text that a language model has drawn."""
        if "sample" in result:
            # As code: in markdown lines would run into each other.
            text = textwrap.indent(result["sample"], "    ")
            self.experiment.add_text("sample", text, result["training"]["steps"])
            self.experiment.flush()


class MetricsFile(Logger):
    """`metrics.csv`: one row per logged step, on disk as soon as it is logged.

    Lightning's CSVLogger deletes an earlier file; a resumed run has to keep it. A new column
    means writing the file again, which is done atomically, so that a kill loses no row. Columns
    stand by group, those of a group in the order in which they were logged: layers in that of the
    model.
    """

    def __init__(self, folder: Path, *, keep_before_step: int = 0) -> None:
        """Open the file at the first row.

        Args:
            folder: The run folder.
            keep_before_step: Keep the rows of an earlier run with a smaller step; this run will
                write the others again.
        """
        super().__init__()
        self._folder = folder
        self._path = folder / METRICS
        self._keep_before_step = keep_before_step
        self._columns: list[str] = []
        self._is_open = False

    @property
    def name(self) -> str:
        """No subfolder."""
        return ""

    @property
    def version(self) -> str:
        """No subfolder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `.hydra/config.yaml` has the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        if "epoch" in row:
            row["epoch"] = int(metrics["epoch"])
        if not self._is_open:
            self._keep_earlier_rows()
        if set(row) <= set(self._columns):
            with (
                writing(self._path),
                self._path.open("a", encoding="utf-8", newline="") as file,
            ):
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        else:
            self._rewrite([*self._read(), row])

    def has_row(self, step: int, names: Collection[str]) -> bool:
        """Tell whether a row of `step` has a value for each of `names`."""
        rows = [row for row in self._read() if row.get("step") == str(step)]
        return any(all(row.get(name) for name in names) for row in rows)

    def _keep_earlier_rows(self) -> None:
        kept = [row for row in self._read() if _step(row) < self._keep_before_step]
        self._rewrite(kept)
        self._is_open = True

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        try:
            text = read_text(self._path)
            whole_lines = text[: text.rfind("\n") + 1]  # a kill may have cut the last row short
            return list(csv.DictReader(io.StringIO(whole_lines)))
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            raise InputError(
                f"{self._path} is damaged ({error}): remove it to go on without the earlier rows"
            ) from error

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(key for row in rows for key in row if key)
        grouped = sorted(names, key=lambda name: name.partition("/")[0])
        self._columns = list(dict.fromkeys(["step", "epoch", *grouped]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomically(self._path, text.getvalue())


def no_further_logger(folder: Path, run_name: str, tags: list[str]) -> None:
    """`logger=csv`: `metrics.csv` is written in any case."""


def tensorboard_logger(folder: Path, run_name: str, tags: list[str]) -> Logger:
    """Write TensorBoard files into `folder/tensorboard`.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        return _TensorBoardFiles(folder, name="", version="tensorboard", default_hp_metric=False)
    except ModuleNotFoundError as error:
        raise InputError(
            "logger=tensorboard needs the extra tensorboard: "
            "pip install -c constraints.txt -e '.[tensorboard]'"
        ) from error


def _step(row: Mapping[str, Any]) -> float:
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")  # no row of ours
