"""Dynamic sparse training as the papers write it: dense tensors, explicit masks, single weights."""

import math

import torch


def replaced_mask(weight, mask, growth, k):
    """Drop the k kept weights nearest to zero, grow the k best of those not kept; first one first.

    All arguments are flat lists; the mask of 0 and 1.
    """
    kept = [i for i in range(len(mask)) if mask[i]]
    kept.sort(key=lambda i: (-abs(weight[i]), i))
    kept = kept[: len(kept) - k]
    others = [i for i in range(len(mask)) if i not in kept]
    others.sort(key=lambda i: (-growth[i], i))
    return [int(i in kept or i in others[:k]) for i in range(len(mask))]


def train(
    weights,
    masks,
    loss,
    batches,
    *,
    lr,
    momentum,
    weight_decay,
    every,
    fraction,
    end,
    decay,
    skip_step,
    growth=None,
):
    """Train with SGD; yield weights and masks after every step.

    Args:
        weights: Dense tensors, zero outside their masks.
        masks: One per weight, of 0 and 1.
        loss: (weights, batch) -> scalar.
        batches: One per step.
        growth: (index, step) -> flat list of scores; `None` for the size of the dense gradient.
    """
    weights = [w.clone() for w in weights]
    masks = [m.clone() for m in masks]
    velocities = [torch.zeros_like(w) for w in weights]
    last = end * len(batches)
    for step, batch in enumerate(batches):
        leaves = [w.clone().requires_grad_() for w in weights]
        dense = torch.autograd.grad(loss(leaves, batch), leaves)
        gradients = [g * m for g, m in zip(dense, masks, strict=True)]
        moves = [0] * len(masks)
        if step > 0 and step % every == 0 and step < last:
            share = fraction
            if decay == "cosine":
                share = fraction / 2 * (1 + math.cos(math.pi * step / last))
            moves = [math.floor(share * int(m.sum())) if not m.all() else 0 for m in masks]
        for i, k in enumerate(moves):
            scores = dense[i].abs().flatten().tolist() if growth is None else growth(i, step)
            flat = replaced_mask(
                weights[i].flatten().tolist(), masks[i].flatten().tolist(), scores, k
            )
            masks[i] = torch.tensor(flat, dtype=masks[i].dtype).view(masks[i].shape)
            for tensors in (weights, velocities, gradients):
                tensors[i] = tensors[i] * masks[i]
        if not (skip_step and any(moves)):
            for i in range(len(weights)):
                gradient = gradients[i] + weight_decay * weights[i]
                velocities[i] = momentum * velocities[i] + gradient
                weights[i] = weights[i] - lr * velocities[i]
        yield [w.clone() for w in weights], [m.clone() for m in masks]
