"""What counting says about a text: the bits per byte of n-gram models, to compare a network with.

Witten and Bell 1991, "The zero-frequency problem": with c(h w) the count of byte w after the
context h, c(h) its sum over w and T(h) the number of different w,

    P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),    h' = h without its first byte,

and 1/256 below the empty context.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["HIGHEST_ORDER", "bits_per_byte"]

HIGHEST_ORDER = 6
"""Bytes of context: with the byte after it, they are a number of 64 bits."""


def bits_per_byte(train: bytes, text: bytes, order: int) -> float:
    """Return the mean of -log2 P over the bytes of `text`, with counts of `train`.

    Args:
        train: What is counted.
        text: What is predicted, as if it came after `train`.
        order: Bytes of context, from 0 to `HIGHEST_ORDER`.
    """
    seen = np.frombuffer(train, dtype=np.uint8)
    joined = np.frombuffer(train[-order:] + text if order else text, dtype=np.uint8)
    probability = np.full(len(text), 1 / 256)
    for length in range(order + 1):
        of_context, of_both, num_kinds = _counts(seen, joined[order - length :], length)
        total = of_context + num_kinds
        known = total > 0
        mixed = of_both[known] + num_kinds[known] * probability[known]
        probability[known] = mixed / total[known]
    return float(-np.log2(probability).mean())


def _counts(
    seen: NDArray[np.uint8], text: NDArray[np.uint8], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return c(h), c(h w) and T(h) for each context of `length` bytes and byte w in `text`."""
    grams, gram_counts = np.unique(_grams(seen, length + 1), return_counts=True)
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    ends = np.append(first[1:], len(grams))
    sums = np.add.reduceat(gram_counts, first)
    wanted = _grams(text, length + 1)
    place, found = _look_up(contexts, wanted >> np.uint64(8))
    gram_place, gram_found = _look_up(grams, wanted)
    zero = np.zeros(len(wanted), dtype=np.int64)
    return (
        np.where(found, sums[place], zero),
        np.where(gram_found, gram_counts[gram_place], zero),
        np.where(found, (ends - first)[place], zero),
    )


def _grams(text: NDArray[np.uint8], length: int) -> NDArray[np.uint64]:
    """Return every run of `length` bytes as one number."""
    count = len(text) - length + 1
    codes = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        codes = (codes << np.uint64(8)) | text[place : place + count].astype(np.uint64)
    return codes


def _look_up(
    known: NDArray[np.uint64], wanted: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return place, known[place] == wanted
