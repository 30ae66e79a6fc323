"""Coefficients of MASA that a network gives, of which nothing is stored but what it gives.

"Share your attention: transformer weight sharing via matrix-based dictionary learning", AAAI 2026,
arXiv 2508.04581: an embedding of each layer goes through three linear layers. For one projection:

    c_l = h_l + V3 gelu(V2 gelu(V1 e_l)) / 64   V3 starts at 0, and so c at h, which is not trained

The sizes are not in the main text.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from memfold.compression.parts import Level

__all__ = ["NETWORK_PARTS", "network_output", "network_shapes", "network_start"]

WIDTH = 64
"""Of embeddings and of what is between two layers."""
NETWORK_PARTS: Mapping[str, Level] = {
    "embedding": "weight",
    "first": "group",
    "second": "group",
    "third": "group",
}


def network_shapes(num_atoms: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of e_l, V1, V2 and V3 for S atoms."""
    square = WIDTH, WIDTH
    return {"embedding": (WIDTH,), "first": square, "second": square, "third": (num_atoms, WIDTH)}


def network_start(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draw a part, float32: outputs of V1 and V2 are as large as their inputs; V3 is 0."""
    if name == "third":
        return torch.zeros(tuple(shape))
    drawn = torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))
    return drawn if name == "embedding" else drawn * (2 / WIDTH) ** 0.5


def network_output(embedding: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Return c_l - h_l, shape (S,)."""
    # Over the width, so that a step of Adam moves it no further than trained coefficients.
    return third @ functional.gelu(second @ functional.gelu(first @ embedding)) / WIDTH
