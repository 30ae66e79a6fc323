"""Columns as numbers and codes, by what the training rows are like."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from memfold.data.spec import Classes, DataSpec, Reals, Table
from memfold.data.tables.columns import (
    Column,
    as_texts,
    is_number,
    numbers_of,
    stray_text,
    too_large,
)
from memfold.errors import InputError

__all__ = ["Encoding", "Target", "fit_encoding", "labels_of", "mean_and_std"]

_FEW_ROWS = 20
"""Of which texts that differ in every row say nothing."""


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
            numbers = numbers_of(values)
            known = ~np.isnan(numbers)
            parts.append(np.where(known, (numbers - column.mean) / column.std, 0.0))
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
        numbers = np.stack([numbers_of(values[name]) for name in target.names], axis=1)
        standardised = (numbers - np.array(target.mean)) / np.array(target.std)
        return torch.from_numpy(standardised).float()


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


def mean_and_std(numbers: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and the standard deviation of numbers (N,): 0 where all are the same.

    The mean of many equal numbers may be another one, and the squares of small ones may be 0.
    """
    if numbers.min() == numbers.max():
        return float(numbers[0]), 0.0
    mean = numbers.mean()
    deviations = numbers - mean
    largest = np.abs(deviations).max()
    return float(mean), float(largest * np.sqrt(np.square(deviations / largest).mean()))


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
        InputError: A column is constant, has no value, a number that is too large, text among
            numbers, or too many categories.
    """
    numeric_columns, categorical_columns = [], []
    for name, values in columns.items():
        if is_number(values) and name not in categorical:
            numbers = numbers_of(values)
            if (row := too_large(numbers)) is not None:
                raise InputError(f"data: column {name!r}: row {row} has {numbers[row - 1]:g}")
            known = numbers[train][~np.isnan(numbers[train])]
            mean, std = mean_and_std(known) if len(known) else (0.0, 0.0)
            if std == 0:
                raise InputError(
                    f"data: column {name!r} is {'constant' if len(known) else 'empty'} in the "
                    f"training rows; leave it out: 'data.drop=[{name}]'"
                )
            numeric_columns.append(
                NumericColumn(name=name, mean=mean, std=std, has_missing=len(known) < len(train))
            )
            continue
        if name not in categorical and (stray := stray_text(values)) is not None:
            raise InputError(
                f"data: column {name!r} has numbers, and in row {stray[0]} {stray[1]!r}; mend "
                f"that, or take all for categories: 'data.categorical=[{name}]'"
            )
        texts = sorted({text for text in as_texts(values[train]) if text is not None})
        if len(texts) < 2:
            raise InputError(
                f"data: column {name!r} is {'constant' if texts else 'empty'} in the training "
                f"rows; leave it out: 'data.drop=[{name}]'"
            )
        if name not in categorical and len(texts) == len(train) > _FEW_ROWS:
            raise InputError(
                f"data: column {name!r} has another text in every row (names, dates?), of which "
                f"nothing can be learned; leave it out: 'data.drop=[{name}]'"
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
