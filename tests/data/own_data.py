"""Data of a user: datasets, and a LightningDataModule with what may be wrong with it."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from memfold.data.custom import Datasets
from memfold.data.digits import Digits
from memfold.data.spec import Classes, DataSpec, Table

ROWS = DataSpec(Table(2), Classes(3))


class Drawing(Dataset):
    """Items with noise from all three generators."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        noise = torch.rand(()) + np.random.uniform() + random.random()
        return torch.stack([noise, torch.tensor(float(item))]).float(), item % 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from ()


class Module(pl.LightningDataModule):
    """Loaders of `Drawing`, with a hook on either side of the transfer."""

    spec = ROWS

    def __init__(self, batch_size: int = 4, loader: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.stages: list[str] = []
        self._loader = loader or (lambda: DataLoader(Drawing(12), batch_size, shuffle=True))

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"rows": batch[0] + 1, "classes": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["rows"] * 2, batch["classes"]

    def train_dataloader(self) -> Any:
        return self._loader()

    val_dataloader = test_dataloader = train_dataloader


class WithoutValidation(Module):
    val_dataloader = pl.LightningDataModule.val_dataloader


class WithoutTest(Module):
    test_dataloader = pl.LightningDataModule.test_dataloader


class WithoutSpec(Module):
    spec = None


def datasets(spec: object = ROWS, size: int = 12, train: object = None) -> Datasets:
    train = Drawing(size) if train is None else train
    return Datasets(spec, train, Drawing(9), Drawing(6))  # type: ignore[arg-type]


def returns_digits(seed: int) -> Digits:
    return Digits(seed=seed)


def returns_number() -> int:
    return 3
