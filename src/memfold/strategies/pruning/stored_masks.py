"""Masks as artifacts and state dicts hold them: counts, and positions in the fewest bytes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memfold import entropy_coding
from memfold.compression.budget import Stored, like
from memfold.errors import InputError
from memfold.quantisation import Coding
from memfold.strategies.pruning.encoding import cheapest, decode, encode
from memfold.strategies.pruning.gaps import from_gaps, to_gaps

__all__ = [
    "CODED",
    "COUNTS",
    "FINGERPRINT",
    "FINGERPRINT_BYTES",
    "INDEX",
    "VALUES",
    "costliest_counts",
    "index_bytes",
    "index_format",
    "masks_of",
    "pack",
    "packed_like",
    "stored_like",
]

VALUES = "kept_values"
COUNTS = "kept_counts"
INDEX = "kept_index"
CODED = "kept_gaps"
"""In place of the index where coded gaps take fewer bytes."""
FINGERPRINT = "kept_fingerprint"
FINGERPRINT_BYTES = 8
"""Stored in place of an index that follows from the seed, or beside one that needs it."""


def index_bytes(counts: Sequence[int], shapes: Sequence[torch.Size]) -> int:
    """Bytes that say where values belong: 8 for the count of each weight, and its cheapest index.

    The format is a function of count and shape (`encoding.cheapest`) and needs no storage.
    """
    return sum(8 + cheapest(n, shape)[1] for n, shape in zip(counts, shapes, strict=True))


def costliest_counts(shapes: Sequence[torch.Size]) -> list[int]:
    """Return the counts of one kept value, in the weight where its index takes the most."""
    sizes = [cheapest(1, shape)[1] for shape in shapes]
    return [int(index == sizes.index(max(sizes))) for index in range(len(shapes))]


def index_format(counts: Sequence[int], shapes: Sequence[torch.Size]) -> str:
    """Name the formats of the masks, each with its number of weights."""
    formats = [cheapest(n, shape)[0] for n, shape in zip(counts, shapes, strict=True)]
    return ", ".join(f"{name} {formats.count(name)}" for name in sorted(set(formats)))


def pack(
    positions: Sequence[Tensor], shapes: Sequence[torch.Size], coding: Coding = "none"
) -> dict[str, Tensor]:
    """Pack masks, given as sorted flat int64 positions of what each keeps, on any device."""
    counts = torch.tensor([len(p) for p in positions], dtype=torch.int64)
    index = torch.cat([encode(p, shape) for p, shape in zip(positions, shapes, strict=True)])
    if coding == "huffman":
        coded = entropy_coding.encode(to_gaps(positions, [shape.numel() for shape in shapes]))
        if len(coded) + entropy_coding.LEAST_SAVED <= len(index):
            return {COUNTS: counts, CODED: coded}
    return {COUNTS: counts, INDEX: index}


def packed_like(counts: Sequence[int], shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
    """Return what `pack` makes of masks with so many kept places, not coded and without values."""
    size = index_bytes(counts, shapes) - 8 * len(counts)
    return {COUNTS: like([len(counts)], torch.int64), INDEX: like([size], torch.uint8)}


def stored_like(
    num_values: int,
    counts: Sequence[int] | None,
    shapes: Sequence[torch.Size],
    dtype: torch.dtype,
) -> Stored:
    """Describe what is stored: kept values, and how many of each weight at which places.

    Args:
        num_values: Number of kept values.
        counts: Those of each weight; `None` where the positions are drawn again.
        shapes: Of the weights.
        dtype: Of the values.
    """
    indices = (
        {FINGERPRINT: like([], torch.int64)} if counts is None else packed_like(counts, shapes)
    )
    return Stored(num_values, {VALUES: like([num_values], dtype)}, indices)


def masks_of(packed: Mapping[str, Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Unpack what `pack` has made: bool tensors on the CPU.

    Raises:
        InputError: Something is missing, damaged, or of other shapes.
    """
    counts, index = packed.get(COUNTS), packed.get(INDEX)
    if counts is None or counts.dtype != torch.int64 or counts.shape != (len(shapes),):
        raise InputError(f"{COUNTS} must be {len(shapes)} int64 numbers, one per weight")
    numbers = [int(count) for count in counts]
    for count, shape in zip(numbers, shapes, strict=True):
        if not 0 <= count <= shape.numel():
            raise InputError(f"{COUNTS}: {count} values cannot be kept of {shape.numel()}")
    if CODED in packed:
        found = from_gaps(
            entropy_coding.decode(packed[CODED]), numbers, [shape.numel() for shape in shapes]
        )
        return [_mask(p, shape) for p, shape in zip(found, shapes, strict=True)]
    sizes = [cheapest(n, shape)[1] for n, shape in zip(numbers, shapes, strict=True)]
    if index is None or index.dtype != torch.uint8 or index.shape != (sum(sizes),):
        raise InputError(f"{INDEX} must be {sum(sizes)} bytes for these counts")
    parts = zip(index.cpu().split(sizes), numbers, shapes, strict=True)
    return [_mask(decode(part, count, shape), shape) for part, count, shape in parts]


def _mask(positions: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[positions] = True
    return mask.view(shape)
