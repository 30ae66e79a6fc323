"""Data of the user's own code: torch datasets, a LightningDataModule, or one of memfold's."""

import inspect
import random
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from memfold.data.batching import Samples
from memfold.data.data_module import DataModule
from memfold.data.source_files import first_line
from memfold.data.spec import DataSpec
from memfold.errors import InputError
from memfold.importing import call, locate
from memfold.options import Count
from memfold.seeding import derive_seed

__all__ = ["Datasets", "build_custom"]


@dataclass(frozen=True)
class Datasets:
    """Three datasets of torch, each item `(input, target)`, and what these are."""

    spec: DataSpec
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


def build_custom(
    *,
    target: str,
    args: Mapping[str, object] | None = None,
    batch_size: Count = 32,
    seed: int = 0,
) -> DataModule:
    """Call the class or function at the dotted path `target` and serve what it gives.

    A `Datasets`, or a LightningDataModule with a `spec`, whose DataLoaders say what the datasets
    are and how items become a batch. Items are read in this process, in the order, shares and
    splits of every other data set; what an item draws is a function of seed, epoch and item. A
    `memfold.data.data_module.DataModule` is used as it is.

    Args:
        target: For example "package.module.Class".
        args: Further keyword arguments of the target; it is given `batch_size` and `seed` too where
            its signature names them.
        batch_size: Samples per batch and process.
        seed: Of the order of the training samples, and what items draw.

    Raises:
        InputError: The path does not lead to a callable, its signature does not fit `args`, or what
            it gives is no data, or lacks something.
    """
    key = f"data.target={target}"
    build = locate(target, "data.target")
    made = call(build, args, _named(build, batch_size=batch_size, seed=seed), "data")
    if isinstance(made, DataModule):
        return made
    if isinstance(made, Datasets):
        return _OfDatasets(made, key=key, batch_size=batch_size, seed=seed)
    if isinstance(made, pl.LightningDataModule):
        return _OfModule(made, key=key, batch_size=batch_size, seed=seed)
    raise InputError(
        f"{key}: gives {type(made).__name__}, must give memfold.data.custom.Datasets or a "
        "LightningDataModule"
    )


def _named(build: Callable[..., object], **facts: object) -> dict[str, object]:
    try:
        names = inspect.signature(build).parameters
    except (ValueError, TypeError):
        return {}
    return {name: fact for name, fact in facts.items() if name in names}


@dataclass(frozen=True)
class _Items:
    """A dataset whose items draw the same numbers wherever and whenever they are read."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    name: str
    seed: int
    epoch: int = -1
    """-1 for items that are not trained on."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, positions: Tensor) -> Any:
        """Return the batch of the items at `positions`."""
        with isolate_rng(include_cuda=False):
            items = [self._item(position) for position in positions.tolist()]
            try:
                return self.collate(items)
            except Exception as error:  # PyTorch's, or the user's own
                raise InputError(
                    f"{self.name}: {len(items)} items make no batch: {first_line(error)}"
                ) from error

    def at_epoch(self, seed: int, epoch: int) -> "_Items":
        """Let items draw what they draw in an epoch."""
        return replace(self, seed=seed, epoch=epoch)

    def _item(self, position: int) -> Any:
        seed = derive_seed(self.seed, "item", self.epoch, position)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return self.dataset[position]


class _Foreign(DataModule):
    """Serves datasets of somebody else, and looks at their batches."""

    name = "custom"

    def __init__(self, spec: object, *, key: str, batch_size: int, seed: int) -> None:
        super().__init__(batch_size=batch_size, split_seed=0, seed=seed)
        if not isinstance(spec, DataSpec):
            what = "nothing" if spec is None else type(spec).__name__
            raise InputError(
                f"{key}: `spec` must be a memfold.data.spec.DataSpec, such as "
                f"DataSpec(Images(3, 32, 32), Classes(10)), got {what}"
            )
        self._spec = spec
        self._key = key

    @property
    def spec(self) -> DataSpec:
        """What the user's code says."""
        return self._spec

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Check a batch.

        Raises:
            InputError: It is not what `spec` says.
        """
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not is_pair or not all(isinstance(part, Tensor) for part in batch):
            raise InputError(
                f"{self._key}: a batch must be a pair of tensors, inputs and targets, got "
                f"{_described(batch)}"
            )
        inputs, targets = batch
        reason = self._spec.inputs.refusal(inputs) or self._spec.target.refusal(targets, inputs)
        if reason is not None:
            raise InputError(f"{self._key}: {reason}")
        return inputs, targets

    def _items(self, dataset: object, name: str, collate: Callable[..., Any]) -> _Items:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise InputError(
                f"{self._key}: {name} must be a dataset with a length, so that every process can "
                f"take its share of it, got {type(dataset).__name__}"
            )
        if not len(dataset):
            raise InputError(f"{self._key}: {name} has no items")
        return _Items(dataset, collate, f"{self._key}: {name}", self.seed)


class _OfDatasets(_Foreign):
    def __init__(self, datasets: Datasets, **options: Any) -> None:
        super().__init__(datasets.spec, **options)
        names = [field.name for field in fields(datasets)][1:]
        self._sets = {
            name: self._items(getattr(datasets, name), name, default_collate) for name in names
        }

    def read_train(self) -> tuple[Samples, Samples]:
        """Take two of the datasets."""
        return self._sets["train"], self._sets["val"]

    def read_test(self) -> Samples:
        """Take the other."""
        return self._sets["test"]


class _OfModule(_Foreign):
    def __init__(self, module: pl.LightningDataModule, **options: Any) -> None:
        super().__init__(getattr(module, "spec", None), **options)
        self._module = module
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            own = getattr(type(module), name)
            # `LightningDataModule.from_datasets` sets them on the object.
            if name not in vars(module) and own is getattr(pl.LightningDataModule, name):
                raise InputError(f"{self._key}: has no {name}")

    def prepare_data(self) -> None:
        """Let the module do it."""
        self._module.prepare_data()

    def read_train(self) -> tuple[Samples, Samples]:
        """Ask the module for two of its loaders."""
        self._module.trainer = self.trainer
        self._module.setup("fit")
        return self._of_loader("train_dataloader"), self._of_loader("val_dataloader")

    def read_test(self) -> Samples:
        """Ask the module for the other."""
        self._module.trainer = self.trainer
        self._module.setup("test")
        return self._of_loader("test_dataloader")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Let the module change a batch, and check it."""
        changed = self._module.on_after_batch_transfer(batch, dataloader_idx)
        return super().on_after_batch_transfer(changed, dataloader_idx)

    def _targets_of(self, batch: Any) -> Tensor:
        return self.on_after_batch_transfer(batch)[1]

    def _of_loader(self, name: str) -> _Items:
        loader = getattr(self._module, name)()
        if not isinstance(loader, DataLoader):
            raise InputError(
                f"{self._key}: {name} must give one torch DataLoader, got {_described(loader)}"
            )
        sampler, dataset, collate = loader.sampler, loader.dataset, loader.collate_fn
        is_iterable = isinstance(dataset, IterableDataset)
        is_plain = type(sampler) in (RandomSampler, SequentialSampler) and loader.batch_size
        if not is_iterable and (not is_plain or getattr(sampler, "replacement", False)):
            raise InputError(
                f"{self._key}: {name} has a sampler of its own, {type(sampler).__name__}, and the "
                "order of samples is memfold's; derive from memfold.data.data_module.DataModule to "
                "choose another"
            )

        def joined(items: list[Any]) -> Any:
            return self._module.on_before_batch_transfer(collate(items), 0)

        return self._items(dataset, name, joined)


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return type(value).__name__
