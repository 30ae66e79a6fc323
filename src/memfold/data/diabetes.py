"""Diabetes (Efron et al. 2004, "Least angle regression"): inside scikit-learn, no download."""

from collections.abc import Mapping

from sklearn.datasets import load_diabetes

from memfold.data.tables.columns import Column
from memfold.data.tables.data_module import TableDataModule
from memfold.data.tables.library import as_columns

__all__ = ["Diabetes"]


class Diabetes(TableDataModule):
    """10 measurements of 442 patients; how far the disease had come a year later."""

    name = "diabetes"

    def read_table(self) -> tuple[Mapping[str, Column], Mapping[str, Column]]:
        """Read the table of the library."""
        return as_columns(load_diabetes(scaled=False), "progression")
