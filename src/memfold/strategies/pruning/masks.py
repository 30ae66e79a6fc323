"""Which weights stay: exact counts, deterministic ties."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["keep_counts", "keep_largest", "schedule_counts", "shuffle_mask"]


def keep_counts(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Keep the `counts[i]` largest scores of tensor i; of equal scores the first stay."""
    masks = []
    for score, count in zip(scores, counts, strict=True):
        order = score.reshape(-1).sort(descending=True, stable=True).indices
        mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        mask[order[:count]] = True
        masks.append(mask.view(score.shape))
    return masks


def keep_largest(
    scores: Sequence[Tensor], count: int, *, scope: Literal["global", "layer"] = "global"
) -> list[Tensor]:
    """Keep `count` weights in all."""
    if scope == "layer":
        total = sum(score.numel() for score in scores)
        exact = [count * score.numel() / total for score in scores]
        counts = [int(share) for share in exact]
        rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in rest[: count - sum(counts)]:
            counts[i] += 1
        return keep_counts(scores, counts)
    flat = torch.cat([score.reshape(-1) for score in scores])
    mask = keep_counts([flat], [count])[0]
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def schedule_counts(total: int, count: int, rounds: int, schedule: str) -> list[int]:
    """Return how many weights stay after each round; the last one is `count`."""
    shares = [(t + 1) / rounds for t in range(rounds)]
    if schedule == "exponential":
        counts = [round(total * (count / total) ** share) for share in shares]
    else:
        counts = [round(total - (total - count) * share) for share in shares]
    return [*counts[:-1], count]


def shuffle_mask(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Permute a mask at random."""
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    return mask.reshape(-1)[order].view(mask.shape)
