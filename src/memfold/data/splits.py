"""Seeded stratified splits."""

import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.seeding import derive_seed

__all__ = ["split_training", "stratified_order"]


def split_training(
    labels: Tensor,
    *,
    val_fraction: float,
    train_subset: int | None,
    seed: int,
    key: str = "val_fraction",
) -> tuple[Tensor, Tensor]:
    """Choose the validation samples and, of the others, the training samples.

    Args:
        labels: (N,) int64: the shares of each are kept.
        val_fraction: Share of all samples that are for validation.
        train_subset: How many of the others to train on; `None` for all.
        seed: Of the choice.
        key: What the share is called, for messages.

    Returns:
        Training and validation samples, as int64 positions in ascending order.

    Raises:
        InputError: A part would be empty, or `train_subset` is more than there are.
    """
    order = stratified_order(labels, derive_seed(seed, "validation"))
    num_val = round(val_fraction * len(labels))
    if not 0 < num_val < len(labels):
        raise InputError(
            f"data.{key}={val_fraction}: parts {num_val} of {len(labels)} samples off; both parts "
            "need at least one"
        )
    rest = order[num_val:].sort().values
    if train_subset is not None:
        if train_subset > len(rest):
            raise InputError(
                f"data.train_subset={train_subset}: must be at most {len(rest)}, what "
                "the validation split leaves"
            )
        chosen = stratified_order(labels[rest], derive_seed(seed, "subset"))[:train_subset]
        rest = rest[chosen].sort().values
    return rest, order[:num_val].sort().values


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
