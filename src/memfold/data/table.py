"""A table of the user: a .csv or .parquet file."""

import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memfold.data.source_files import first_line
from memfold.data.tables.columns import EXACT, Column, column_of
from memfold.data.tables.data_module import TableDataModule
from memfold.errors import InputError
from memfold.options import check_arguments

__all__ = ["TableFile"]


class TableFile(TableDataModule):
    """One file; all of its columns but the target are inputs."""

    name = "table"

    def __init__(self, *, file: str, target: str | Sequence[str], **options: Any) -> None:
        """Check the options; no file is touched.

        Args:
            file: A .csv or .parquet file.
            target: The column to predict, or a list of columns of numbers.
            **options: See `TableDataModule`.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(**options)
        check_arguments(TableFile.__init__, locals(), "data.")
        self._file = Path(file).expanduser()
        self._targets = [target] if isinstance(target, str) else list(target)
        if self._file.suffix not in (".csv", ".parquet"):
            raise InputError(f"data.file={file}: must be a .csv or a .parquet file")
        if not self._targets:
            raise InputError("data.target=[]: must name a column")
        if len(set(self._targets)) < len(self._targets):
            raise InputError(f"data.target={target}: names a column twice")

    def own_files(self) -> Mapping[str, Path]:
        """See `DataModule.own_files`."""
        return {"file": self._file}

    @property
    def source(self) -> dict[str, object]:
        """The file and what is predicted of it."""
        target = self._targets[0] if len(self._targets) == 1 else self._targets
        return {"file": os.path.abspath(self._file), "target": target, **super().source}

    def read_table(self) -> tuple[Mapping[str, Column], Mapping[str, Column]]:
        """Read the file with pandas."""
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                "data=table needs the extra tables: pip install -c constraints.txt -e '.[tables]'"
            ) from error
        if not self._file.is_file():
            raise InputError(f"data.file={self._file}: there is no such file")
        try:
            if self._file.suffix == ".csv":
                # Read as rows, a header shorter than they are is an error, not a hidden index.
                options = {"header": None, "nrows": 2, "dtype": str, "keep_default_na": False}
                names = pandas.read_csv(self._file, **options).iloc[0].tolist()
                # A whole number among missing ones would become a float.
                frame = pandas.read_csv(self._file, dtype_backend="numpy_nullable")
            else:
                frame = pandas.read_parquet(self._file)
                if index := [name for name in frame.index.names if name is not None]:
                    frame = frame.reset_index(level=index)
                names = [str(name) for name in frame.columns]
        except Exception as error:  # pandas' parsers have many of their own
            raise InputError(f"data.file={self._file}: {first_line(error)}") from error
        if frame.empty:
            raise InputError(f"data.file={self._file}: has no rows")
        self._refuse_header(names)
        columns = {name: _column(frame.iloc[:, i]) for i, name in enumerate(names)}
        missing = [name for name in self._targets if name not in columns]
        if missing:
            raise InputError(
                f"data.target={missing[0]}: {self._file.name} has no such column; columns: "
                f"{', '.join(names)}"
            )
        targets = {name: columns.pop(name) for name in self._targets}
        return columns, targets

    def _refuse_header(self, names: Sequence[str]) -> None:
        """Refuse columns that pandas would name itself: one may be the target once more."""
        for place, name in enumerate(names, start=1):
            if not name:
                raise InputError(
                    f"data.file={self._file}: column {place} has no name; a saved index? Every "
                    "column needs a name of its own"
                )
            if names.index(name) < place - 1:
                raise InputError(f"data.file={self._file}: two columns are called {name!r}")


def _column(series: Any) -> Column:
    """Return what a column of pandas holds."""
    from pandas.api.types import is_integer_dtype, is_numeric_dtype

    series = series.convert_dtypes()  # truth values among missing ones are numbers, too
    if is_numeric_dtype(series):
        numbers = series.to_numpy(dtype=np.float64, na_value=np.nan)
        if not (is_integer_dtype(series) and (np.abs(numbers) >= EXACT).any()):
            return numbers
    return column_of(series)
