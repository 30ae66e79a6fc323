"""The data module that every set of text shares."""

import bisect
import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from memfold.data.source_files import (
    folder_of_sets,
    move_into_place,
    new_folder,
    writable_folder,
)
from memfold.data.text.count_models import bits_per_byte
from memfold.data.text.token_data_module import Stream, TokenDataModule
from memfold.data.text.token_files import map_tokens, write_tokens
from memfold.data.text.tokenizers import (
    Bytes,
    FromLibrary,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from memfold.errors import InputError
from memfold.files import read_text
from memfold.options import Count, Interval, check_arguments

__all__ = ["SPLITS", "Text", "TextDataModule", "part_by_position"]

SPLITS = ("train", "val", "test")
_LONG = 2**22
"""Bytes of text from which counting takes a while."""
_CACHED = 2**20
"""Bytes of text from which encoding does."""
_REFERENCES = TypeAdapter(dict[str, float])
_LAYOUT = "memfold-2"
"""Part of the fingerprint of a cache: to be changed with what it holds."""


@dataclass(frozen=True)
class Text:
    """Documents, one after the other."""

    content: bytes
    boundaries: tuple[int, ...] = ()
    """Positions in `content` where documents begin, ascending, without 0."""

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> "Text":
        """Join documents."""
        ends = list(accumulate(map(len, documents)))
        return cls(b"".join(documents), tuple(ends[:-1]))

    def documents(self) -> list[bytes]:
        """Return them one by one."""
        edges = [0, *self.boundaries, len(self.content)]
        return [self.content[i:j] for i, j in pairwise(edges)]


def part_by_position(text: Text, val_fraction: float, test_fraction: float) -> dict[str, Text]:
    """Part a text into training, validation and test, in this order; no character is cut.

    Args:
        text: All of it.
        val_fraction: Share of its bytes for validation.
        test_fraction: Share of its bytes for the test.
    """
    size = len(text.content)
    cuts = [0]
    for share in (1 - val_fraction - test_fraction, 1 - test_fraction):
        cut = round(share * size)
        while cut < size and text.content[cut] & 0xC0 == 0x80:  # within a character of UTF-8
            cut += 1
        cuts.append(cut)
    cuts.append(size)
    parts = {}
    for split, begin, end in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
        first = bisect.bisect_right(text.boundaries, begin)
        last = bisect.bisect_left(text.boundaries, end)
        inside = tuple(place - begin for place in text.boundaries[first:last])
        parts[split] = Text(text.content[begin:end], inside)
    return parts


class TextDataModule(TokenDataModule):
    """Text as tokens.

    A subclass reads the text. Every byte of a split is a target exactly once, the first one after a
    line break or, in a stream, the token before the split.
    """

    def __init__(
        self,
        *,
        root: str | Path = "data",
        batch_size: Count = 16,
        length: Count = 128,
        stride: Count | None = None,
        tokenizer: str = "bytes",
        vocabulary_size: Annotated[int, Interval("[257, 16777216]")] = 1024,
        separate_documents: bool = False,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            root: Folder of data sets.
            batch_size: See `TokenDataModule`.
            length: See `TokenDataModule`.
            stride: See `TokenDataModule`.
            tokenizer: `bytes`; `bpe`, trained on the training split; or a tokenizer.json.
            vocabulary_size: Of `bpe`, at least 257.
            separate_documents: Whether windows end where documents do.
            seed: See `TokenDataModule`.
            download: Whether missing files may be downloaded.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(batch_size=batch_size, length=length, stride=stride, seed=seed)
        check_arguments(TextDataModule.__init__, locals(), "data.")
        self.root = folder_of_sets(root)
        self._wanted_size = vocabulary_size
        self.separate_documents = separate_documents
        self.download = download
        self._wanted = tokenizer
        self._tokenizer = Bytes() if tokenizer == "bytes" else None

    @abstractmethod
    def read_text(self) -> dict[str, Text]:
        """Read the text of each of `SPLITS`.

        Raises:
            InputError: A file is missing or damaged, or empty.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the tokens; BPE is trained when it is asked for first.

        Raises:
            InputError: The text or the tokenizer cannot be read.
        """
        if self._tokenizer is None:
            if self._wanted == "bpe":
                self.prepare_data()
                self._tokenizer = train_bpe(self.read_text()["train"].content, self._wanted_size)
            else:
                self._tokenizer = load_tokenizer(Path(self._wanted).expanduser())
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """That of the tokenizer."""
        return self.tokenizer.vocabulary_size

    @property
    def bytes_of(self) -> tuple[int, ...] | float:
        """As the tokenizer says."""
        return self.tokenizer.bytes_of

    def references(self) -> dict[str, float]:
        """Return the bits per byte of counting on the test split, as if it followed the training.

        Kept in the folder of the data set, where the text is long.
        """
        texts = self.read_text()
        train, test = texts["train"].content, texts["test"].content
        file = None
        if len(train) > _LONG:
            digest = hashlib.blake2b(train, digest_size=8)
            digest.update(test)
            file = writable_folder(self.root, self.name) / f"counts-{digest.hexdigest()}.json"
            with suppress(OSError, ValueError):
                return _REFERENCES.validate_json(read_text(file))
        found = {f"order-{order} counts": bits_per_byte(train, test, order) for order in (0, 4)}
        if file is not None:
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(_REFERENCES.dump_json(found))
        return found

    def read_streams(self) -> dict[str, Stream]:
        """Encode the text of the splits."""
        texts = self.read_text()
        tokenizer = self.tokenizer
        before = tokenizer.encode(b"\n")[-1:]
        found = {}
        for split in SPLITS:
            if self.separate_documents:
                documents = [self._encode(part) for part in texts[split].documents()]
                pieces = [piece for tokens in documents for piece in (before, tokens)]
                ends = np.cumsum([1 + len(tokens) for tokens in documents]).tolist()
                found[split] = (np.concatenate(pieces), tuple(ends[:-1]))
            else:
                tokens = self._encode(texts[split].content)
                found[split] = (np.concatenate([before, tokens]), ())
                before = tokens[-1:] if len(tokens) else before
        return found

    def _encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Encode, from the cache if somebody has done so before; bytes are their own tokens."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, FromLibrary) or len(text) < _CACHED:
            return tokenizer.encode(text)
        digest = hashlib.blake2b(f"{_LAYOUT} {tokenizer.to_json()}".encode(), digest_size=8)
        digest.update(text)
        parent = writable_folder(self.root, self.name)
        cache = parent / f"tokens-{digest.hexdigest()}"
        with suppress(InputError):  # there is none, or someone has cut it short
            return map_tokens(cache / "tokens.bin")
        shutil.rmtree(cache, ignore_errors=True)
        with new_folder(parent) as unfinished:
            write_tokens(unfinished / "tokens.bin", tokenizer.encode(text))
            move_into_place(unfinished, cache)
        return map_tokens(cache / "tokens.bin")
