"""Ready-made tokens of the user: flat files, of memfold, of nanoGPT and its like, or of NumPy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from memfold.data.text.data_module import SPLITS
from memfold.data.text.file_options import by_place, paths_of, source_of
from memfold.data.text.token_data_module import Stream, TokenDataModule
from memfold.data.text.token_files import Dtype, map_any
from memfold.data.text.tokenizers import FromLibrary, load_tokenizer
from memfold.errors import InputError
from memfold.files import read_text
from memfold.options import Interval, Positive, check_arguments

__all__ = ["TokenFiles"]

_MAX_VOCABULARY = 2**24
"""A network has a row of weights for each token, and no tokenizer has as many."""
FACTS = "data.json"
"""In the folder of a run on such files: what was read from them."""


class Facts(BaseModel):
    """What a run keeps of its tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    vocabulary_size: int


class TokenFiles(TokenDataModule):
    """Files of tokens; parted by position, or with files of their own for validation and test.

    One file for a split is memory-mapped; several are joined in memory. In an evaluation every
    token of a split but its first is a target once; what is parted off by position has the token
    before it, too.
    """

    name = "tokens"

    def __init__(
        self,
        *,
        files: Sequence[str],
        val_files: Sequence[str] | None = None,
        test_files: Sequence[str] | None = None,
        val_fraction: Annotated[float, Interval("(0, 1)")] = 0.05,
        test_fraction: Annotated[float, Interval("(0, 1)")] = 0.05,
        dtype: Dtype | None = None,
        vocabulary_size: Annotated[int, Interval("[1, 16777216]")] | None = None,
        tokenizer: str | None = None,
        bytes_per_token: Positive | None = None,
        **options: Any,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            files: Paths of the tokens to train on, in this order.
            val_files: Of the validation tokens; null: `val_fraction` of `files`, towards the end.
            test_files: Of the test tokens, if `val_files` is given; null: `test_fraction` of
                `files`, at the end.
            val_fraction: Share of the tokens, in (0, 1).
            test_fraction: Share of the tokens, in (0, 1).
            dtype: `uint16` or `uint32`, of files without a header; null: files have one, or are
                .npy.
            vocabulary_size: Tokens there are, at most 2^24; null: as many as `tokenizer` has or,
                without one, one more than the largest in all files.
            tokenizer: A tokenizer.json, by which bytes are counted and samples are written.
            bytes_per_token: Mean bytes of text that a token stands for, where no tokenizer tells;
                null: the primary metric is the loss in nats per token, not bits per byte.
            **options: See `TokenDataModule`.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(**options)
        check_arguments(TokenFiles.__init__, locals(), "data.")
        if tokenizer is not None and bytes_per_token is not None:
            raise InputError(
                "data.tokenizer and data.bytes_per_token: give one, either tells how many bytes "
                "tokens stand for"
            )
        self._paths = paths_of(
            files, val_files, test_files, val_fraction=val_fraction, test_fraction=test_fraction
        )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._dtype: Dtype | None = dtype
        self._vocabulary_size = vocabulary_size
        self._wanted = tokenizer
        self._bytes_per_token = bytes_per_token

    def own_files(self) -> Mapping[str, Path]:
        """See `DataModule.own_files`."""
        return by_place(self._paths)

    @property
    def source(self) -> dict[str, object]:
        """The files of each split."""
        return source_of(self._paths)

    @property
    def tokenizer(self) -> FromLibrary | None:
        """That of the file which the user names, if any."""
        if self._tokenizer is None and self._wanted is not None:
            self._tokenizer = load_tokenizer(Path(self._wanted).expanduser())
        assert self._tokenizer is None or isinstance(self._tokenizer, FromLibrary)
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """What the user says, or the tokenizer, or the files."""
        known = 0 if self.tokenizer is None else self.tokenizer.vocabulary_size
        if self._vocabulary_size is None:
            self._vocabulary_size = known or 1 + max(
                self._largest_in(path) for paths in self._paths for path in paths
            )
        if self._vocabulary_size < known:
            raise InputError(
                f"data.vocabulary_size={self._vocabulary_size}: data.tokenizer={self._wanted} has "
                f"{known} tokens"
            )
        return self._vocabulary_size

    def _largest_in(self, path: Path) -> int:
        tokens = map_any(path, self._dtype)
        largest = int(tokens.max(initial=0))
        if largest >= _MAX_VOCABULARY:
            raise InputError(
                f"{path}: token {largest} at place {int(tokens.argmax())}, and no vocabulary has "
                f"more than {_MAX_VOCABULARY} tokens; is it a file of {tokens.dtype} tokens "
                "(data.dtype)?"
            )
        return largest

    @property
    def bytes_of(self) -> tuple[int, ...] | float | None:
        """As the tokenizer says, or the user; `None` where neither does."""
        if self.tokenizer is None:
            return self._bytes_per_token
        counts = self.tokenizer.bytes_of
        return counts + (0,) * (self.vocabulary_size - len(counts))

    def write_facts(self, folder: Path) -> None:
        """Keep with a run the size of the vocabulary and the tokenizer."""
        super().write_facts(folder)
        facts = Facts(vocabulary_size=self.vocabulary_size)
        (folder / FACTS).write_text(facts.model_dump_json() + "\n", encoding="utf-8")

    def read_facts(self, folder: Path) -> None:
        """Take what a run has kept.

        Raises:
            InputError: It cannot be read.
        """
        super().read_facts(folder)
        file = folder / FACTS
        try:
            self._vocabulary_size = Facts.model_validate_json(read_text(file)).vocabulary_size
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error

    def read_streams(self) -> dict[str, Stream]:
        """Map the files."""
        size = self.vocabulary_size
        joined = []
        for paths in self._paths:
            parts = [map_any(path, self._dtype) for path in paths]
            for path, part in zip(paths, parts, strict=True):
                if len(part) and (largest := int(part.max())) >= size:
                    raise InputError(
                        f"{path}: token {largest} at place {int(part.argmax())}, and the "
                        f"vocabulary has {size} (data.vocabulary_size, or the tokenizer's)"
                    )
            joined.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
        if len(joined) < len(SPLITS):
            (whole,) = joined
            val = round((1 - self.val_fraction - self.test_fraction) * len(whole))
            test = round((1 - self.test_fraction) * len(whole))
            joined = [whole[:val], whole[max(val - 1, 0) : test], whole[max(test - 1, 0) :]]
        return {split: (tokens, ()) for split, tokens in zip(SPLITS, joined, strict=True)}
