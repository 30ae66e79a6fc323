"""Add the parts of a gradient to their windows of a vector."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["add_parts"]


def add_parts(
    flat: Tensor,
    lengths: int | list[int],
    starts: np.ndarray,
    signs: np.ndarray,
    factor: float,
    out: Tensor,
) -> None:
    """Add part after part, those of one sign in one call; the order of additions is fixed.

    Args:
        flat: The parts, one after the other.
        lengths: Of each part, or of all.
        starts: Where each part goes in `out`: int64, shape (parts,).
        signs: -1 or +1, shape (parts,).
        factor: Of all parts.
        out: Changed in place, of the dtype of `flat`; no window wraps.
    """
    parts, places = flat.split(lengths), starts.tolist()
    for sign in (1, -1):
        chosen = np.flatnonzero(signs == sign).tolist()
        if chosen:
            targets = [out.narrow(0, places[i], parts[i].numel()) for i in chosen]
            # PyTorch has no public name for an addition of lists of tensors.
            torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
                targets, [parts[i] for i in chosen], alpha=factor * sign
            )
