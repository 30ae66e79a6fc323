"""Tables of scikit-learn."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from memfold.data.tables.columns import Column

__all__ = ["as_columns"]


def as_columns(bunch: Any, target: str) -> tuple[Mapping[str, Column], Mapping[str, Column]]:
    """Return the columns of a `Bunch`, and its target under the name `target`."""
    names = map(str, bunch.feature_names)
    columns = {name: bunch.data[:, i].astype(np.float64) for i, name in enumerate(names)}
    values: Column = bunch.target.astype(np.float64)
    if "target_names" in bunch:  # of classes
        values = np.array([str(bunch.target_names[i]) for i in bunch.target], dtype=np.object_)
    return columns, {target: values}
