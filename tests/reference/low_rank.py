"""Low-rank training as the paper writes it: single entries, single ranks, an explicit penalty."""

import torch


def conv_weight(left, right, shape):
    """W[o, i, a, b] = sum over r of U[(o, a), r] V[(i, b), r]."""
    out, inp, height, width = shape
    weight = torch.zeros(shape, dtype=left.dtype)
    for o in range(out):
        for i in range(inp):
            for a in range(height):
                for b in range(width):
                    weight[o, i, a, b] = left[o * height + a] @ right[i * width + b]
    return weight


def grow_ranks(shapes, num_values, rule):
    """Give one rank at a time to the smallest matrix that can still pay for it.

    Returns:
        The ranks, 0 for dense, and the values that are left.
    """

    def cost(shape, rank):
        return min(rank * (shape[0] + shape[1]), shape[0] * shape[1])

    def share(i):
        full = min(shapes[i]) if rule == "proportional" else 1
        return ((ranks[i] + 1) / full, i)

    ranks = [1 for _ in shapes]
    left = num_values - sum(cost(shape, 1) for shape in shapes)
    while True:
        candidates = []
        for i, shape in enumerate(shapes):
            step = cost(shape, ranks[i] + 1) - cost(shape, ranks[i])
            if 0 < step <= left:
                candidates.append(i)
        if not candidates:
            break
        i = min(candidates, key=share)
        left -= cost(shapes[i], ranks[i] + 1) - cost(shapes[i], ranks[i])
        ranks[i] += 1
    dense = [rank * sum(s) >= s[0] * s[1] for rank, s in zip(ranks, shapes, strict=True)]
    return [0 if d else rank for rank, d in zip(ranks, dense, strict=True)], left


def train(pairs, others, loss, batches, make_optimizer, *, decay, decoupled_rate=None):
    """Train factors with the penalty decay / 2 |U V^T|^2 and without any decay of their own.

    Args:
        pairs: [(U, V)].
        others: Parameters that the optimizer decays as it does.
        loss: (weights U V^T, others, batch) -> scalar.
        batches: One per step.
        make_optimizer: Parameter groups -> optimizer.
        decay: lambda.
        decoupled_rate: Learning rate with which the penalty's gradient is subtracted from the
            factors; `None` to let the optimizer have it as part of the loss.
    """
    pairs = [(u.clone().requires_grad_(), v.clone().requires_grad_()) for u, v in pairs]
    others = [p.clone().requires_grad_() for p in others]
    factors = [factor for pair in pairs for factor in pair]
    optimizer = make_optimizer([{"params": factors, "weight_decay": 0.0}, {"params": others}])
    for batch in batches:
        products = [u @ v.T for u, v in pairs]
        penalty = sum(decay / 2 * product.square().sum() for product in products)
        optimizer.zero_grad()
        value = loss(products, others, batch)
        if decoupled_rate is None:
            (value + penalty).backward()
            optimizer.step()
        else:
            slopes = torch.autograd.grad(penalty, factors, retain_graph=True)
            value.backward()
            optimizer.step()
            with torch.no_grad():
                for factor, slope in zip(factors, slopes, strict=True):
                    factor -= decoupled_rate * slope
    return [tensor.detach() for tensor in (*factors, *others)]
