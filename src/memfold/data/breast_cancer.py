"""Breast cancer, Wisconsin diagnostic (Wolberg et al. 1995): inside scikit-learn, no download.

569 rows: one row of a fifth is 0.9 points. `data.fold=k` tests on one part of five.
"""

from collections.abc import Mapping

from sklearn.datasets import load_breast_cancer

from memfold.data.tables.columns import Column
from memfold.data.tables.data_module import TableDataModule
from memfold.data.tables.library import as_columns

__all__ = ["BreastCancer"]


class BreastCancer(TableDataModule):
    """30 measurements of a cell nucleus; malignant or benign."""

    name = "breast_cancer"

    def read_table(self) -> tuple[Mapping[str, Column], Mapping[str, Column]]:
        """Read the table of the library."""
        return as_columns(load_breast_cancer(), "diagnosis")
