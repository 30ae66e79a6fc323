"""The data module that every set of tokens shares, whether they come from text or from files."""

from abc import abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memfold.data.batching import Samples
from memfold.data.data_module import DataModule
from memfold.data.spec import DataSpec, NextToken, Tokens
from memfold.data.text.tokenizers import FromLibrary, Tokenizer, load_tokenizer
from memfold.data.text.windows import EvaluationWindows, TrainingWindows
from memfold.errors import InputError
from memfold.options import Count, check_arguments

__all__ = ["Stream", "TokenDataModule"]

TOKENIZER = "tokenizer.json"
"""In the folder of a run whose tokens are those of a tokenizer's file."""
Stream = tuple[NDArray[np.unsignedinteger], tuple[int, ...]]
"""Tokens (N,), and where documents begin if they are kept apart: ascending, without 0."""


class TokenDataModule(DataModule):
    """Windows of tokens, and for each token the one that follows.

    A subclass reads the tokens of the splits. Each of a split but the first, or the first of every
    document, is a target exactly once.

    A batch is `(tokens, next tokens)`, int64 (B, length); targets that do not count are -100.
    """

    def __init__(
        self,
        *,
        batch_size: Count = 16,
        length: Count = 128,
        stride: Count | None = None,
        seed: int = 0,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            batch_size: Windows per batch and process.
            length: Tokens of a window.
            stride: Of the windows of evaluation, from 1 to `length`: below it they overlap, and
                every target but those of the first window sees at least `length - stride` tokens.
                null: `length`.
            seed: Of the order of the windows, and where they start.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(batch_size=batch_size, split_seed=0, seed=seed)
        check_arguments(TokenDataModule.__init__, locals(), "data.")
        if stride is not None and stride > length:
            raise InputError(f"data.stride={stride} must be at most data.length={length}")
        self.length = length
        self.stride = stride
        self._tokenizer: Tokenizer | None = None
        self._streams: dict[str, Stream] | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the tokens; `None` where nobody knows.

        Raises:
            InputError: It cannot be read.
        """
        return self._tokenizer

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Tokens there are.

        Raises:
            InputError: A file that tells cannot be read.
        """

    @property
    @abstractmethod
    def bytes_of(self) -> tuple[int, ...] | float | None:
        """Bytes that tokens stand for; see `NextToken`."""

    @abstractmethod
    def read_streams(self) -> dict[str, Stream]:
        """Read the tokens of "train", "val" and "test".

        The first token, of a split or of a document, is what comes before it.

        Raises:
            InputError: A file is missing or damaged.
        """

    @property
    def spec(self) -> DataSpec:
        """Windows of tokens, and the token that follows each."""
        size = self.vocabulary_size
        return DataSpec(Tokens(size, self.length), NextToken(size, self.bytes_of))

    def write_facts(self, folder: Path) -> None:
        """Keep the tokenizer with the run, if it is not that of bytes."""
        if isinstance(self.tokenizer, FromLibrary):
            (folder / TOKENIZER).write_text(self.tokenizer.to_json(), encoding="utf-8")

    def read_facts(self, folder: Path) -> None:
        """Take the tokenizer of a run, which may have been trained."""
        if self._tokenizer is None and (folder / TOKENIZER).exists():
            self._tokenizer = load_tokenizer(folder / TOKENIZER)

    def tokens(self, split: str) -> Stream:
        """Return the tokens of a split, and where documents begin if they are kept apart.

        Raises:
            InputError: They cannot be read, or are fewer than a window.
        """
        if self._streams is None:
            self._streams = self.read_streams()
        found, boundaries = self._streams[split]
        if len(found) <= 1 or (split == "train" and len(found) < 2 * self.length):
            raise InputError(
                f"data={self.name}: the {split} split has {max(len(found) - 1, 0)} tokens to "
                f"predict, too few for windows of data.length={self.length}"
            )
        return found, boundaries

    def read_train(self) -> tuple[Samples, Samples]:
        """Cut the training and the validation split into windows."""
        tokens, boundaries = self.tokens("train")
        train: Samples = TrainingWindows(tokens, self.length)
        if boundaries:
            train = EvaluationWindows(tokens, self.length, boundaries=boundaries)
        return train, self._evaluated("val")

    def read_test(self) -> Samples:
        """Cut the test split into windows."""
        return self._evaluated("test")

    def _evaluated(self, split: str) -> EvaluationWindows:
        tokens, boundaries = self.tokens(split)
        return EvaluationWindows(tokens, self.length, stride=self.stride, boundaries=boundaries)
