"""Pruning as the papers write it: explicit masks, loops over layers and units, bisection."""

from fractions import Fraction
from itertools import product
from math import prod

import torch
from torch.func import functional_call


def mask_sensitivities(model, names, inputs, targets, loss):
    """|dL(c * theta) / dc| at c = 1: SNIP, eq. 4."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(state[name], requires_grad=True) for name in names}
    masked = {name: tensor * masks.get(name, 1) for name, tensor in state.items()}
    value = loss(functional_call(model, masked, (inputs,)), targets)
    gradients = torch.autograd.grad(value, list(masks.values()))
    return [gradient.abs() for gradient in gradients]


def squared_gradient_norm(model, names, batches, loss, temperature, seed):
    """||dL/dtheta||^2 over the named parameters, in training mode, outputs over the temperature.

    L is the mean over all samples; dropout draws from the seed, batch after batch.
    """
    model.train().zero_grad()
    total = sum(len(inputs) for inputs, _ in batches)
    torch.manual_seed(seed)
    for inputs, targets in batches:
        (loss(model(inputs) / temperature, targets) * len(inputs) / total).backward()
    parameters = dict(model.named_parameters())
    return sum(float(parameters[name].grad.square().sum()) for name in names)


def linear_flows(matrices):
    """SynFlow of a bias-free multilayer perceptron, path by path: R and every weight's share.

    R is the sum over all paths, from any input to any output, of the product of absolute weights.
    """
    widths = [matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices)]
    scores = [torch.zeros_like(matrix) for matrix in matrices]
    total = 0.0
    for path in product(*(range(width) for width in widths)):
        steps = list(zip(path[1:], path[:-1], strict=True))
        flow = prod(abs(float(matrix[step])) for matrix, step in zip(matrices, steps, strict=True))
        total += flow
        for score, step in zip(scores, steps, strict=True):
            score[step] += flow
    return total, scores


def synflow_masks(model, names, shape, ratio, rounds):
    """The loop of Tanaka et al., with its thresholds: (1 - rho_t) N weights are gone, rounded down.

    A weight whose score is at the threshold is gone too, so the masks may keep fewer.
    """
    model.eval()
    state = {name: tensor.detach().abs() for name, tensor in model.state_dict().items()}
    masks = [torch.ones_like(state[name]) for name in names]
    for number in range(1, rounds + 1):
        kept = [(state[n] * m).requires_grad_() for n, m in zip(names, masks, strict=True)]
        inputs = torch.ones(1, *shape, dtype=kept[0].dtype)
        flow = functional_call(model, state | dict(zip(names, kept, strict=True)), (inputs,)).sum()
        gradients = torch.autograd.grad(flow, kept)
        scores = [(g * w.detach()).abs() for g, w in zip(gradients, kept, strict=True)]
        everything = torch.cat([score.flatten() for score in scores]).sort().values
        gone = int((1 - ratio ** (number / rounds)) * len(everything))
        if gone > 0:
            masks = [(score > everything[gone - 1]).to(score) for score in scores]
    return [mask.bool() for mask in masks]


def live_weights(masks):
    """Which kept weights of a multilayer perceptron lie on a path of kept weights, by search."""
    live = [torch.zeros_like(mask) for mask in masks]
    widths = [masks[0].shape[1], *(mask.shape[0] for mask in masks)]
    for path in product(*(range(width) for width in widths)):
        steps = list(zip(path[1:], path[:-1], strict=True))
        if all(bool(mask[step]) for mask, step in zip(masks, steps, strict=True)):
            for layer, step in zip(live, steps, strict=True):
                layer[step] = True
    return live


def largest(scores, count):
    """Global selection with a sorted list of (-score, position)."""
    flat = [(-float(x), i) for i, x in enumerate(x for s in scores for x in s.flatten())]
    kept = {i for _, i in sorted(flat)[:count]}
    masks, start = [], 0
    for score in scores:
        bits = [start + i in kept for i in range(score.numel())]
        masks.append(torch.tensor(bits, dtype=torch.bool).view(score.shape))
        start += score.numel()
    return masks


def equal_shares(sizes, count):
    """One entry after the other, to whom half of it more would give the smallest share."""
    counts = [0] * len(sizes)
    for _ in range(count):
        shares = [Fraction(2 * n + 1, 2 * size) for n, size in zip(counts, sizes, strict=True)]
        counts[shares.index(min(shares))] += 1
    return counts


def largest_remainders(sizes, count):
    """How equal shares were rounded in earlier versions."""
    exact = [Fraction(count * size, sum(sizes)) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])
    first = set(order[: count - sum(map(int, exact))])
    return [int(share) + (i in first) for i, share in enumerate(exact)]


def erk_densities(shapes, count, power_scale=1.0):
    """min(1, eps raw^p), with eps found by bisection."""
    sizes = [prod(shape) for shape in shapes]
    raw = [(sum(shape) / prod(shape)) ** power_scale for shape in shapes]

    def kept(eps):
        return sum(min(1.0, eps * r) * n for r, n in zip(raw, sizes, strict=True))

    low, high = 0.0, 2 / min(raw)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < count else (low, middle)
    return [min(1.0, high * r) for r in raw]
