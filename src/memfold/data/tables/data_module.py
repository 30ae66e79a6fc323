"""The data module that every table shares."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from memfold.data.batching import Chosen, Samples
from memfold.data.data_module import DataModule
from memfold.data.spec import DataSpec
from memfold.data.splits import stratified_order
from memfold.data.tables.columns import (
    Column,
    as_texts,
    is_number,
    numbers_of,
    stray_text,
    too_large,
)
from memfold.data.tables.encoding import Encoding, Target, fit_encoding, labels_of, mean_and_std
from memfold.errors import InputError
from memfold.files import read_text
from memfold.options import Count, Interval, Natural, check_arguments
from memfold.seeding import derive_seed

__all__ = ["Rows", "TableDataModule"]

FACTS = "data.json"
"""In the folder of a run on a table: what the training rows are like."""
_FEW = 20
"""Whole numbers with at most so many values are classes, unless the user says otherwise."""


@dataclass(frozen=True)
class Rows:
    """Rows and their targets, in memory."""

    inputs: Tensor
    """(N, num_numeric + categories) float32."""
    targets: Tensor
    """(N,) int64 or (N, num_outputs) float32."""

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows at `positions`."""
        return self.inputs[positions], self.targets[positions]

    def at_epoch(self, seed: int, epoch: int) -> "Rows":
        """Return the rows: they are the same in every epoch."""
        return self


class TableDataModule(DataModule):
    """Standardises numbers, encodes categories, parts the rows.

    A subclass reads the table. Everything that is measured is measured on the training rows alone,
    and kept with the run. A batch is `(rows float32 (B, columns), targets)`: see
    `memfold.data.spec.Table`.
    """

    def __init__(
        self,
        *,
        batch_size: Count = 64,
        val_fraction: Annotated[float, Interval("(0, 1)")] = 0.15,
        test_fraction: Annotated[float, Interval("(0, 1)")] = 0.15,
        fold: Natural | None = None,
        num_folds: Annotated[int, Interval("[2, inf)")] = 5,
        target_type: Literal["auto", "classes", "reals"] = "auto",
        categorical: Sequence[str] = (),
        drop: Sequence[str] = (),
        max_categories: Annotated[int, Interval("[2, 16777215]")] = 1000,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            batch_size: Rows per batch and process.
            val_fraction: Share of the rows that are not for the test, in (0, 1).
            test_fraction: Share of all rows for the test, in (0, 1), unless `fold` is given.
            fold: Test on this part of `num_folds`, from 0; null: one split.
            num_folds: Parts, at least 2.
            target_type: `classes` or `reals`; `auto` takes text and whole numbers of few values for
                classes.
            categorical: Columns of numbers that are categories.
            drop: Columns to leave out.
            max_categories: Of a column.
            split_seed: Of the splits, and the folds.
            seed: Of the order of the training rows.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(batch_size=batch_size, split_seed=split_seed, seed=seed)
        check_arguments(TableDataModule.__init__, locals(), "data.")
        if fold is not None and fold >= num_folds:
            raise InputError(f"data.fold={fold} must be below data.num_folds={num_folds}")
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.fold = fold
        self.num_folds = num_folds
        self.target_type = target_type
        self.categorical = tuple(categorical)
        self.drop = tuple(drop)
        self.max_categories = max_categories
        self._encoding: Encoding | None = None
        self._rows: Rows | None = None
        self._parts: dict[str, Tensor] = {}

    @abstractmethod
    def read_table(self) -> tuple[Mapping[str, Column], Mapping[str, Column]]:
        """Read the columns, and those that are to be predicted.

        Raises:
            InputError: A file or a column is missing, or damaged.
        """

    @property
    def source(self) -> dict[str, object]:
        """In how many folds; which one is no more than a seed."""
        return {} if self.fold is None else {"folds": self.num_folds}

    @property
    def spec(self) -> DataSpec:
        """Rows of numbers and codes, and classes or numbers."""
        return self.encoding.spec

    @property
    def encoding(self) -> Encoding:
        """From columns to what a network takes; measured when it is asked for first.

        Raises:
            InputError: The table cannot be read, or an option does not suit it.
        """
        if self._encoding is None:
            self._read()
        assert self._encoding is not None
        return self._encoding

    def write_facts(self, folder: Path) -> None:
        """Keep with a run what was measured."""
        text = self.encoding.model_dump_json(indent=1)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")

    def read_facts(self, folder: Path) -> None:
        """Take what a run has measured.

        Raises:
            InputError: It cannot be read.
        """
        file = folder / FACTS
        try:
            self._encoding = Encoding.model_validate_json(read_text(file))
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error

    def read_train(self) -> tuple[Samples, Samples]:
        """Choose the training and the validation rows."""
        rows = self._read()
        return Chosen(rows, self._parts["train"]), Chosen(rows, self._parts["val"])

    def read_test(self) -> Samples:
        """Choose the test rows."""
        return Chosen(self._read(), self._parts["test"])

    def _read(self) -> Rows:
        if self._rows is not None:
            return self._rows
        columns, targets = self.read_table()
        if not columns:
            raise InputError("data: there is no column beside the target")
        for key, names in (("categorical", self.categorical), ("drop", self.drop)):
            if unknown := [name for name in names if name not in columns]:
                raise InputError(
                    f"data.{key}: there is no column {unknown[0]!r}; columns: {', '.join(columns)}"
                )
        columns = {name: values for name, values in columns.items() if name not in self.drop}
        if not columns:
            raise InputError("data.drop leaves no column")
        kind = self._kind(targets)
        names, labels = _classes(targets) if kind == "classes" else ((), None)
        self._parts = self._part(len(next(iter(targets.values()))), labels)
        train = self._parts["train"].numpy()
        target = (
            Target(kind="classes", names=names) if labels is not None else _reals(targets, train)
        )
        self._encoding = fit_encoding(
            columns,
            target,
            train,
            categorical=frozenset(self.categorical),
            max_categories=self.max_categories,
        )
        self._rows = Rows(self._encoding.inputs(columns), self._encoding.targets(targets))
        return self._rows

    def _kind(self, targets: Mapping[str, Column]) -> str:
        texts = [name for name, values in targets.items() if not is_number(values)]
        if self.target_type == "reals" or (self.target_type == "auto" and len(targets) > 1):
            if texts:
                row, text = stray_text(targets[texts[0]]) or (1, as_texts(targets[texts[0]])[0])
                raise InputError(
                    f"data.target={texts[0]}: row {row} has {text!r}, and numbers are needed"
                )
            return "reals"
        if len(targets) > 1:
            raise InputError("data.target: several columns of classes; take one")
        ((name, values),) = targets.items()
        if self.target_type == "auto" and texts and (stray := stray_text(values)) is not None:
            raise InputError(
                f"data.target={name}: has numbers, and in row {stray[0]} {stray[1]!r}; mend that, "
                "or say data.target_type=classes"
            )
        if self.target_type == "classes" or texts:
            return "classes"
        numbers = numbers_of(values)
        distinct = np.unique(numbers[~np.isnan(numbers)])
        if len(distinct) > _FEW or (distinct % 1).any():
            return "reals"
        return "classes" if len({*as_texts(values)} - {None}) <= _FEW else "reals"

    def _part(self, num_rows: int, labels: Tensor | None) -> dict[str, Tensor]:
        kinds = torch.zeros(num_rows, dtype=torch.int64) if labels is None else labels
        order = stratified_order(kinds, derive_seed(self.split_seed, "test"))
        if self.fold is None:
            num_test = round(self.test_fraction * num_rows)
            test, rest = order[:num_test], order[num_test:]
        else:
            is_test = torch.arange(num_rows) % self.num_folds == self.fold
            test, rest = order[is_test], order[~is_test]
        rest = rest.sort().values
        inner = stratified_order(kinds[rest], derive_seed(self.split_seed, "validation"))
        num_val = round(self.val_fraction * len(rest))
        parts = {"test": test, "val": rest[inner[:num_val]], "train": rest[inner[num_val:]]}
        for split, positions in parts.items():
            if not len(positions):
                raise InputError(
                    f"data: {num_rows} rows leave none for {split}; see data.val_fraction, "
                    "data.test_fraction and data.num_folds"
                )
        return {split: positions.sort().values for split, positions in parts.items()}


def _classes(targets: Mapping[str, Column]) -> tuple[tuple[str, ...], Tensor]:
    ((name, values),) = targets.items()
    texts = as_texts(values)
    if None in texts:
        raise InputError(
            f"data.target={name}: row {texts.index(None) + 1} has no value (in a .csv NA, None, "
            "null and the like say so, too; give a class another name)"
        )
    counts: dict[str, int] = {}
    for text in texts:
        assert text is not None
        counts[text] = counts.get(text, 0) + 1
    if len(counts) < 2:
        raise InputError(f"data.target={name}: all rows are {next(iter(counts))!r}, one class")
    rare = [text for text, count in counts.items() if count < 3]
    if rare:
        raise InputError(
            f"data.target={name}: class {rare[0]!r} is seen {counts[rare[0]]} time(s); the three "
            "splits need one each (data.target_type=reals, if these are numbers)"
        )
    is_numeric = is_number(values)
    names = tuple(sorted(counts, key=(lambda text: (float(text), text)) if is_numeric else None))
    return names, labels_of(values, names)


def _reals(targets: Mapping[str, Column], train: Any) -> Target:
    means, stds = [], []
    for name, values in targets.items():
        numbers = numbers_of(values)
        if np.isnan(numbers).any():
            row = int(np.flatnonzero(np.isnan(numbers))[0]) + 1
            raise InputError(f"data.target={name}: row {row} has no number")
        if (row := too_large(numbers)) is not None:
            raise InputError(f"data.target={name}: row {row} has {numbers[row - 1]:g}")
        mean, std = mean_and_std(numbers[train])
        if std == 0:
            raise InputError(f"data.target={name}: is constant in the training rows")
        means.append(mean)
        stds.append(std)
    return Target(kind="reals", names=tuple(targets), mean=tuple(means), std=tuple(stds))
