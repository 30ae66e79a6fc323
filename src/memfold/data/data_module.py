"""The data module that all data sets share: stages, batches, ranks, resumption."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from memfold.data.batching import (
    Chosen,
    EvaluationLoader,
    EvaluationSampler,
    Samples,
    TrainingLoader,
    TrainingSampler,
)
from memfold.data.spec import Classes, DataSpec
from memfold.errors import InputError
from memfold.options import Count, check_arguments
from memfold.seeding import derive_seed

__all__ = ["DataModule"]

_SCORING_BATCH_SIZE = 128


class DataModule(pl.LightningDataModule, ABC):
    """Serves the samples that a data set's class reads, as batches of (inputs, targets).

    A subclass says what a sample is (`spec`) and reads the splits; `prepare_data`, which one
    process calls, is for what has to be downloaded or made first. The test set is read in the test
    stage alone.
    """

    name: ClassVar[str]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Name in `conf/data`, and of the folder in `data.root`."""

    def __init__(self, *, batch_size: Count, split_seed: int, seed: int) -> None:
        """Check the options; no file is touched.

        Args:
            batch_size: Samples per batch and process.
            split_seed: Of the splits.
            seed: Of the order of the training samples, and of what training makes of them.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__()
        check_arguments(DataModule.__init__, locals(), "data.")
        self.batch_size = batch_size
        self.split_seed = split_seed
        self.seed = seed
        self._train: Samples | None = None
        self._val: Samples | None = None
        self._test: Samples | None = None
        self._train_loader: TrainingLoader | None = None
        self._resume_at: dict[str, Any] | None = None

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """What one sample is.

        Raises:
            InputError: The files that tell cannot be read.
        """

    @property
    def source(self) -> dict[str, object]:
        """Which data these are, where the name does not say it: options, with absolute paths.

        Reports never average, nor compare, runs that differ in it.
        """
        return {}

    @abstractmethod
    def read_train(self) -> tuple[Samples, Samples]:
        """Read the training and the validation split.

        Raises:
            InputError: A file is missing or damaged, or an option does not suit it.
        """

    @abstractmethod
    def read_test(self) -> Samples:
        """Read the test split.

        Raises:
            InputError: A file is missing or damaged.
        """

    def own_files(self) -> Mapping[str, Path]:
        """Return the user's files that samples are made of, by names that moving them leaves."""
        return {}

    def write_facts(self, folder: Path) -> None:
        """Keep in a run folder what was measured of the data: nothing, where the class says all."""

    def read_facts(self, folder: Path) -> None:
        """Take what a run has kept, so that its network can be built without the data.

        Raises:
            InputError: It cannot be read.
        """

    def references(self) -> dict[str, float]:
        """Return what simple models reach on the test split: of text, in its primary metric."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Say of the splits that were read what a result keeps.

        Returns:
            `samples`: the number in each of `train`, `val` and `test`. `chance`: the accuracy on
            the validation split of naming its most frequent class, `None` for other targets.
        """
        splits = {"train": self._train, "val": self._val, "test": self._test}
        samples = {name: len(split) for name, split in splits.items() if split is not None}
        return {"samples": samples, "chance": self._chance()}

    def _chance(self) -> float | None:
        target = self.spec.target
        if not isinstance(target, Classes) or self._val is None:
            return None
        counts = torch.zeros(target.num_classes, dtype=torch.int64)
        for positions in torch.arange(len(self._val)).split(_SCORING_BATCH_SIZE):
            counts += self._targets_of(self._val[positions]).bincount(minlength=len(counts))
        return int(counts.max()) / len(self._val)

    def _targets_of(self, batch: Any) -> Tensor:
        """Return the targets (B, ...) of a batch of samples that is still on the CPU."""
        return batch[1]

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs: "fit" and "validate" all but the test split, "test" that alone.

        Raises:
            InputError: As `read_train` and `read_test` do.
        """
        if stage in ("fit", "validate", None) and self._train is None:
            self._train, self._val = self.read_train()
        if stage in ("test", None) and self._test is None:
            self._test = self.read_test()

    def train_dataloader(self) -> TrainingLoader:
        """Return this process's share of the shuffled training batches.

        Raises:
            InputError: A global batch would hold more than the training set, or the Trainer is
                to overfit: it would see other batches in every epoch.
        """
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            raise InputError(
                f"trainer.overfit_batches={overfit_batches}: must be 0; to overfit a few samples "
                "set data.train_subset to their number"
            )
        samples = _loaded(self._train, "fit")
        rank, world_size = self._place_among_processes()
        sampler = TrainingSampler(
            len(samples), self.batch_size, seed=self.seed, rank=rank, world_size=world_size
        )
        self._train_loader = TrainingLoader(samples, sampler)
        if self._resume_at is not None:
            self._train_loader.load_state_dict(self._resume_at)
            self._resume_at = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training set, for a checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on from the place in a checkpoint.

        Lightning tells the loader itself, but too late where a task has asked for the number of
        steps before the checkpoint is restored.
        """
        self._resume_at = state_dict

    def val_dataloader(self) -> EvaluationLoader:
        """Return this process's share of the validation split."""
        return self._evaluation_loader(_loaded(self._val, "fit"))

    def test_dataloader(self) -> EvaluationLoader:
        """Return this process's share of the test split."""
        return self._evaluation_loader(_loaded(self._test, "test"))

    def scoring_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training set once, not augmented, in a random order.

        The same on every rank, whatever the batch size of training: what is scored on these
        batches does not depend on the number of processes. Files are prepared when they have to be.

        Args:
            seed: Of the order.
        """
        if self._train is None:
            self.prepare_data()
            self.setup("fit")
        samples = _loaded(self._train, "fit")
        generator = torch.Generator().manual_seed(derive_seed(seed, "scoring-batches"))
        ordered = Chosen(samples, torch.randperm(len(samples), generator=generator))
        sampler = EvaluationSampler(len(ordered), _SCORING_BATCH_SIZE, rank=0, world_size=1)
        for batch in EvaluationLoader(ordered, sampler):
            yield self.on_after_batch_transfer(batch)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, ...], dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Make (inputs, targets) of a batch, on the model's device."""
        inputs, targets = batch
        return inputs, targets

    def _evaluation_loader(self, samples: Samples) -> EvaluationLoader:
        rank, world_size = self._place_among_processes()
        sampler = EvaluationSampler(len(samples), self.batch_size, rank=rank, world_size=world_size)
        return EvaluationLoader(samples, sampler)

    def _place_among_processes(self) -> tuple[int, int]:
        """Return (rank, number of processes); (0, 1) outside a Trainer."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _loaded(samples: Samples | None, stage: str) -> Samples:
    if samples is None:
        raise RuntimeError(f"call setup({stage!r}) before asking for this data loader")
    return samples
