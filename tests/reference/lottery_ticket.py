"""Iterative magnitude pruning with rewinding, on dense weights times masks, step by step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["lottery_ticket"]


def lottery_ticket(
    initial: Sequence[Tensor],
    loss: Callable[[list[Tensor], int], Tensor],
    counts: Sequence[int],
    *,
    rewind_step: int,
    num_steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> list[list[Tensor]]:
    """Train round after round with SGD.

    Args:
        initial: Dense weights.
        loss: (weights, step) -> scalar; the step chooses the batch.
        counts: Number of weights in each round.
        rewind_step: Where every round but the first starts.
        num_steps: Where every round ends.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.

    Returns:
        The dense weights, zero where pruned, at the end of every round.
    """
    weights = [w.clone() for w in initial]
    velocities = [torch.zeros_like(w) for w in initial]
    masks = [torch.ones_like(w) for w in initial]
    point: tuple[list[Tensor], list[Tensor]] = ([], [])
    ends = []
    for number, count in enumerate(counts):
        if number > 0:
            every = [
                (float(w.abs()), -tensor, -place)
                for tensor, values in enumerate(weights)
                for place, w in enumerate(values.flatten())
                if masks[tensor].flatten()[place]
            ]
            for _, tensor, place in sorted(every)[: len(every) - count]:
                masks[-tensor].view(-1)[-place] = 0
            weights = [w * m for w, m in zip(point[0], masks, strict=True)]
            velocities = [v * m for v, m in zip(point[1], masks, strict=True)]
        for step in range(rewind_step if number else 0, num_steps):
            if number == 0 and step == rewind_step:
                point = ([w.clone() for w in weights], [v.clone() for v in velocities])
            leaves = [w.clone().requires_grad_() for w in weights]
            masked = [w * m for w, m in zip(leaves, masks, strict=True)]
            gradients = torch.autograd.grad(loss(masked, step), leaves)
            for tensor, gradient in enumerate(gradients):
                total = gradient + weight_decay * weights[tensor]
                velocities[tensor] = momentum * velocities[tensor] + total
                weights[tensor] = weights[tensor] - lr * velocities[tensor]
        ends.append([w.clone() for w in weights])
    return ends
