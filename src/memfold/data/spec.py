"""What one sample is: the inputs of a network, and what it shall say of them.

Data modules give a `DataSpec`, backbones are built for one, tasks learn one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memfold.errors import InputError

__all__ = ["IGNORED", "Classes", "DataSpec", "Images", "NextToken", "Reals", "Table", "Tokens"]

IGNORED = -100
"""A target that does not count, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Images:
    """A batch is float32 (B, channels, height, width), normalised."""

    channels: int
    height: int
    width: int

    kind = "images"

    def example(self, batch_size: int) -> Tensor:
        """Return a batch of ones."""
        return torch.ones(batch_size, self.channels, self.height, self.width)

    def refusal(self, batch: Tensor) -> str | None:
        """Say why a batch is none of these; `None` where it is one."""
        return _other("images", batch, torch.float32, (self.channels, self.height, self.width))


@dataclass(frozen=True)
class Tokens:
    """A batch is int64 (B, length), in [0, vocabulary_size)."""

    vocabulary_size: int
    length: int
    """Of a sequence, at most: the last ones of a set may be shorter."""

    kind = "tokens"

    def example(self, batch_size: int) -> Tensor:
        """Return a batch of the first tokens of the vocabulary, one after the other."""
        return (torch.arange(self.length) % self.vocabulary_size).expand(batch_size, -1)

    def refusal(self, batch: Tensor) -> str | None:
        """Say why a batch is none of these; `None` where it is one."""
        reason = _other("tokens", batch, torch.int64, (min(batch.shape[-1], self.length),))
        return reason or _outside("token", batch, self.vocabulary_size)


@dataclass(frozen=True)
class Table:
    """A batch is float32 (B, num_numeric + categories): numbers, then categories as codes.

    Float32 holds every whole number up to 2^24, more than a column may have categories.
    """

    num_numeric: int
    cardinalities: tuple[int, ...] = ()
    """Of each categorical column: its codes are in [0, cardinality), 0 for a missing value."""

    kind = "tables"

    def example(self, batch_size: int) -> Tensor:
        """Return a batch of ones: every cardinality is at least 2."""
        return torch.ones(batch_size, self.num_numeric + len(self.cardinalities))

    def refusal(self, batch: Tensor) -> str | None:
        """Say why a batch is none of these; `None` where it is one."""
        num_columns = self.num_numeric + len(self.cardinalities)
        reason = _other("rows", batch, torch.float32, (num_columns,))
        for column, size in enumerate(self.cardinalities, start=self.num_numeric):
            reason = reason or _outside(f"code in column {column}", batch[:, column], size)
        return reason


@dataclass(frozen=True)
class Classes:
    """A target is int64 (B,), in [0, num_classes)."""

    num_classes: int
    names: tuple[str, ...] = ()
    """Of the classes; empty where nobody has named them."""

    kind = "classes"

    @property
    def num_outputs(self) -> int:
        """Of a network: a logit for each class."""
        return self.num_classes

    def refusal(self, batch: Tensor, inputs: Tensor) -> str | None:
        """Say why a batch is none of these, for such inputs; `None` where it is one."""
        reason = _other("classes", batch, torch.int64, (), len(inputs))
        return reason or _outside("class", batch, self.num_classes)


@dataclass(frozen=True)
class Reals:
    """A target is float32 (B, num_outputs), standardised: (value - mean) / std."""

    mean: tuple[float, ...]
    """Of each column over the training split, in the user's unit."""
    std: tuple[float, ...]
    names: tuple[str, ...] = ()

    kind = "reals"

    def __post_init__(self) -> None:
        """Check that targets can be standardised.

        Raises:
            InputError: There are no columns, another number of standard deviations than of means,
                or one is not above 0.
        """
        if not 0 < len(self.mean) == len(self.std):
            raise InputError(
                f"spec: Reals: {len(self.mean)} means and {len(self.std)} standard deviations; "
                "each column needs one of each"
            )
        if not (all(map(math.isfinite, self.mean)) and all(0 < s < math.inf for s in self.std)):
            raise InputError(
                f"spec: Reals: mean={self.mean}, std={self.std}: must be finite numbers, and std "
                "above 0; leave a constant target out"
            )

    @property
    def num_outputs(self) -> int:
        """Of a network: one for each column."""
        return len(self.mean)

    def refusal(self, batch: Tensor, inputs: Tensor) -> str | None:
        """Say why a batch is none of these, for such inputs; `None` where it is one."""
        return _other("numbers", batch, torch.float32, (self.num_outputs,), len(inputs))


@dataclass(frozen=True)
class NextToken:
    """A target is int64 (B, length): the token that follows; `IGNORED` where none counts."""

    vocabulary_size: int
    bytes_of: tuple[int, ...] | float | None = 1
    """Bytes of text that tokens stand for: a number for each, or one for all; `None`: unknown."""

    kind = "next_token"

    @property
    def num_outputs(self) -> int:
        """Of a network, for each token: a logit for each that may follow."""
        return self.vocabulary_size

    def refusal(self, batch: Tensor, inputs: Tensor) -> str | None:
        """Say why a batch is none of these, for such inputs; `None` where it is one."""
        reason = _other("next tokens", batch, torch.int64, tuple(inputs.shape[1:]), len(inputs))
        return reason or _outside("token", batch[batch != IGNORED], self.vocabulary_size)


Inputs = Images | Tokens | Table
Target = Classes | Reals | NextToken


@dataclass(frozen=True)
class DataSpec:
    """What goes into a network, and what its outputs are compared with."""

    inputs: Inputs
    target: Target

    def __post_init__(self) -> None:
        """Check that tokens follow tokens.

        Raises:
            InputError: They do not, or are of another vocabulary.
        """
        if not isinstance(self.target, NextToken):
            return
        size = getattr(self.inputs, "vocabulary_size", 0)
        if size != self.target.vocabulary_size:
            raise InputError(
                f"spec: the next of {self.target.vocabulary_size} tokens must follow as many kinds "
                f"of tokens, not {self.inputs}"
            )

    @property
    def num_outputs(self) -> int:
        """Of a network, for each sample or token."""
        return self.target.num_outputs

    def __str__(self) -> str:
        return f"{self.inputs} -> {self.target}"


def _other(
    what: str, batch: Tensor, dtype: torch.dtype, shape: tuple[int, ...], size: int | None = None
) -> str | None:
    """Say how a batch differs from `dtype` and (size, *shape); any size will do by default."""
    is_same = batch.dim() > 0 and batch.dtype == dtype and tuple(batch.shape[1:]) == shape
    if is_same and size in (None, len(batch)):
        return None
    sizes = ", ".join(map(str, ("B" if size is None else size, *shape)))
    expected = f"{dtype} ({sizes}{',' if not shape else ''})"
    return f"a batch of {what} must be {expected}, got {batch.dtype} {tuple(batch.shape)}"


def _outside(what: str, values: Tensor, size: int) -> str | None:
    """Say which value is not in [0, size)."""
    wrong = values[~((values >= 0) & (values < size)) | (values % 1 != 0)]
    return f"{what} {wrong[0]:g} must be a whole number in 0..{size - 1}" if len(wrong) else None
