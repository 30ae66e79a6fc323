"""Bytes to tokens and back, and how many bytes each token stands for."""

from abc import ABC, abstractmethod
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfold.errors import InputError
from memfold.files import read_text

__all__ = ["Bytes", "FromLibrary", "Tokenizer", "load_tokenizer", "train_bpe"]


class Tokenizer(ABC):
    """Between text in UTF-8 and tokens."""

    name: str
    vocabulary_size: int
    bytes_of: tuple[int, ...] | float
    """Bytes that tokens stand for: a number for each, 0 of special ones, or one for all."""

    @abstractmethod
    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Return the tokens (N,) of a text.

        Raises:
            InputError: It needs UTF-8, and the text is something else.
        """

    @abstractmethod
    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text of tokens (N,), with a replacement for what is no character."""


class Bytes(Tokenizer):
    """Each byte is a token."""

    name = "bytes"
    vocabulary_size = 256
    bytes_of = 1

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Return the bytes."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text of bytes."""
        return tokens.astype(np.uint8).tobytes().decode(errors="replace")


class FromLibrary(Tokenizer):
    """A tokenizer of the library `tokenizers`."""

    bytes_of: tuple[int, ...]

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Take over a tokenizer.

        Args:
            name: What it is called in results.
            tokenizer: Of class `tokenizers.Tokenizer`.
        """
        self.name = name
        self._tokenizer = tokenizer
        self.vocabulary_size = tokenizer.get_vocab_size()
        self._pieces = _pieces_of(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self.bytes_of = tuple(
            0 if number in special else len(piece) for number, piece in enumerate(self._pieces)
        )

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Return the tokens of a text in UTF-8.

        Raises:
            InputError: It is something else, or its tokens stand for another text.
        """
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"data.tokenizer={self.name} needs text in UTF-8: {error.reason} at byte "
                f"{error.start}; data.tokenizer=bytes takes anything"
            ) from error
        dtype = np.uint16 if self.vocabulary_size <= 2**16 else np.uint32
        numbers = self._tokenizer.encode(decoded, add_special_tokens=False).ids
        meant = b"".join(map(self._pieces.__getitem__, numbers))
        if meant != text:
            pairs = zip(meant, text, strict=False)
            place = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            raise InputError(
                f"data.tokenizer={self.name}: from byte {place} on its tokens stand for "
                f"{meant[place : place + 8]!r}, and the text is {text[place : place + 8]!r}, so "
                "that bits per byte would be wrong; take one that changes nothing (no normalizer, "
                "add_prefix_space false), such as GPT-2's"
            )
        return np.array(numbers, dtype)

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        """Return what `load_tokenizer` reads."""
        return self._tokenizer.to_str(pretty=False)


def train_bpe(text: bytes, vocabulary_size: int) -> FromLibrary:
    """Train byte-pair encoding on bytes: any text has tokens, and a token has its bytes.

    Args:
        text: The training split, in UTF-8.
        vocabulary_size: At least 257; fewer where the text has no more pairs.

    Raises:
        InputError: The library is missing, or the text is not UTF-8.
    """
    library = _import_library()
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.tokenizer=bpe needs text in UTF-8: {error.reason} at byte {error.start}; "
            "data.tokenizer=bytes takes anything"
        ) from error
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(decoded.splitlines(keepends=True), trainer)
    return FromLibrary("bpe", tokenizer)


def load_tokenizer(file: Path) -> FromLibrary:
    """Read a tokenizer file, `tokenizer.json` of the library `tokenizers`.

    Raises:
        InputError: It is missing or damaged, or the library is.
    """
    library = _import_library()
    try:
        return FromLibrary(file.name, library.Tokenizer.from_str(read_text(file)))
    except InputError:
        raise
    except Exception as error:  # the library raises Exception itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"data.tokenizer={file}: must be bytes, bpe or a tokenizer.json ({reason})"
        ) from error


def _pieces_of(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each token, whose name has a character for each where bytes are encoded.

    Raises:
        InputError: It is another kind of tokenizer: nothing tells which bytes a token has.
    """
    # Bytes that are printable stand for themselves, the others follow 255 in their order.
    alphabet = sorted(_import_library().pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in alphabet if ord(character) < 256]
    byte_of = dict(zip(alphabet, [*printable, *sorted({*range(256)} - {*printable})], strict=True))
    added = tokenizer.get_added_tokens_decoder()
    pieces = [b""] * tokenizer.get_vocab_size()
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            pieces[number] = str(token).encode()
            continue
        if not set(token) <= byte_of.keys():
            raise InputError(
                f"data.tokenizer: the token {token!r} is not made of bytes, and bits per byte need "
                "that; take a tokenizer with byte-level pieces, such as GPT-2's"
            )
        pieces[number] = bytes(byte_of[character] for character in token)
    return pieces


def _import_library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "data.tokenizer needs the extra transformers: pip install -c constraints.txt "
            "-e '.[transformers]' (data.tokenizer=bytes needs nothing)"
        ) from error
    return tokenizers
