"""Seeded stratified splits."""

import torch
from torch import Tensor

__all__ = ["stratified_order"]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Order the samples at random so that every prefix is stratified.

    Within its class c of n samples a sample gets a random rank r in 0..n-1; all samples are then
    sorted by (r + u) / n, with u drawn from U(0, 1) for each class. So the number of samples of a
    class in a prefix is its share, rounded up or down at random, and prefixes are nested: a
    larger subset contains a smaller one.

    Args:
        labels: (N,) int64 classes.
        seed: The same labels and seed give the same order.

    Returns:
        (N,) int64, a permutation of 0..N-1.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels)
    first_of_class = counts.cumsum(0) - counts
    offsets = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    classes = labels[grouped]
    ranks = torch.arange(len(labels)) - first_of_class[classes]
    positions = (ranks + offsets[classes]) / counts[classes]
    return grouped[positions.argsort(stable=True)]
