"""Columns as numbers and codes, by what the training rows are like."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from memfold.data.spec import Classes, DataSpec, Reals, Table
from memfold.errors import InputError

__all__ = ["Encoding", "fit_encoding", "is_number", "labels_of"]

Column = NDArray[np.float64] | NDArray[np.object_]
"""Numbers, NaN where one is missing; or texts, `None` where one is missing."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NumericColumn(_Record):
    """Becomes (value - mean) / std, 0 where it is missing; then 1 there, if any was in training."""

    name: str
    mean: float
    std: float
    has_missing: bool


class CategoricalColumn(_Record):
    """Becomes 1 + the place of its text; 0 where it is missing or was never seen in training."""

    name: str
    categories: tuple[str, ...]


class Target(_Record):
    """Of classes their names, of numbers the mean and the standard deviation in training."""

    names: tuple[str, ...]
    kind: Literal["classes", "reals"]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Encoding(_Record):
    """From columns to what a network takes."""

    numeric: tuple[NumericColumn, ...]
    categorical: tuple[CategoricalColumn, ...]
    target: Target

    @property
    def spec(self) -> DataSpec:
        """What a row becomes."""
        num_numeric = sum(1 + column.has_missing for column in self.numeric)
        inputs = Table(num_numeric, tuple(1 + len(c.categories) for c in self.categorical))
        target = self.target
        if target.kind == "classes":
            return DataSpec(inputs, Classes(len(target.names), target.names))
        return DataSpec(inputs, Reals(target.mean, target.std, target.names))

    def inputs(self, columns: Mapping[str, Column]) -> Tensor:
        """Return rows (N, num_numeric + categories), float32.

        Raises:
            InputError: A column is missing, or has text where there were numbers.
        """
        missing = [c.name for c in (*self.numeric, *self.categorical) if c.name not in columns]
        if missing:
            raise InputError(f"data: there is no column {missing[0]!r}")
        parts: list[NDArray[np.float64]] = []
        for column in self.numeric:
            values = columns[column.name]
            if not is_number(values):
                raise InputError(f"data: column {column.name!r} has text where numbers were")
            known = ~np.isnan(values)
            parts.append(np.where(known, (values - column.mean) / column.std, 0.0))
            if column.has_missing:
                parts.append((~known).astype(np.float64))
        for column in self.categorical:
            codes: dict[str | None, int] = {t: code for code, t in enumerate(column.categories, 1)}
            texts = as_texts(columns[column.name])
            parts.append(np.array([codes.get(text, 0) for text in texts], dtype=np.float64))
        return torch.from_numpy(np.stack(parts, axis=1)).float()

    def targets(self, values: Mapping[str, Column]) -> Tensor:
        """Return classes (N,) int64, or standardised numbers (N, num_outputs) float32."""
        target = self.target
        if target.kind == "classes":
            (column,) = values.values()
            return labels_of(column, target.names)
        numbers = np.stack([np.asarray(values[name], np.float64) for name in target.names], axis=1)
        standardised = (numbers - np.array(target.mean)) / np.array(target.std)
        return torch.from_numpy(standardised).float()


def is_number(values: Column) -> bool:
    """Tell a column of numbers from one of texts."""
    return values.dtype != np.object_


def as_texts(values: Column) -> list[str | None]:
    """Return what names a category: the text, or the number as it is written."""
    if is_number(values):
        return [None if np.isnan(v) else f"{v:g}" for v in values.tolist()]
    return [None if v is None else str(v) for v in values.tolist()]


def labels_of(values: Column, names: tuple[str, ...]) -> Tensor:
    """Return the place (N,) int64 of each value among the names of classes.

    Raises:
        InputError: One is missing, or is no such class.
    """
    codes = {name: code for code, name in enumerate(names)}
    found = [codes.get(text, -1) if text is not None else -1 for text in as_texts(values)]
    if min(found) < 0:
        row = found.index(-1)
        raise InputError(f"data.target: row {row + 1} has none of the classes {', '.join(names)}")
    return torch.tensor(found)


def fit_encoding(
    columns: Mapping[str, Column],
    target: Target,
    train: NDArray[np.int64],
    *,
    categorical: frozenset[str],
    max_categories: int,
) -> Encoding:
    """Measure the training rows.

    Args:
        columns: Name -> values of all rows.
        target: What is predicted.
        train: Numbers of the training rows.
        categorical: Columns of numbers that are categories.
        max_categories: Of a column.

    Raises:
        InputError: A column is constant, has no value, or has too many categories.
    """
    numeric_columns, categorical_columns = [], []
    for name, values in columns.items():
        seen = values[train]
        if is_number(values) and name not in categorical:
            known = seen[~np.isnan(seen)]
            if len(np.unique(known)) < 2:
                raise InputError(
                    f"data: column {name!r} is {'constant' if len(known) else 'empty'} in the "
                    f"training rows; leave it out: 'data.drop=[{name}]'"
                )
            mean, std = float(known.mean()), float(known.std())
            numeric_columns.append(
                NumericColumn(name=name, mean=mean, std=std, has_missing=len(known) < len(seen))
            )
            continue
        texts = sorted({text for text in as_texts(seen) if text is not None})
        if len(texts) < 2:
            raise InputError(
                f"data: column {name!r} is {'constant' if texts else 'empty'} in the training "
                f"rows; leave it out: 'data.drop=[{name}]'"
            )
        if len(texts) > max_categories:
            raise InputError(
                f"data: column {name!r} has {len(texts)} categories, data.max_categories="
                f"{max_categories}; raise that, or leave it out: 'data.drop=[{name}]'"
            )
        categorical_columns.append(CategoricalColumn(name=name, categories=tuple(texts)))
    return Encoding(
        numeric=tuple(numeric_columns), categorical=tuple(categorical_columns), target=target
    )
