"""Error feedback: values are rounded one after the other, each making up for those before it.

Elias Frantar, Saleh Ashkboos, Torsten Hoefler and Dan Alistarh, "GPTQ: accurate post-training
quantization for generative pre-trained transformers", ICLR 2023, arXiv 2210.17323; there for the
rows of a matrix, here for numbers v of which weights are multiples, each of any number of weights:

    W_l[r, c] = a_l[r, c] v[h_l(r, c)]
    sum over layers and samples of |dW_l x|^2 = dv' Q dv
    Q = sum over layers l and rows r of A_lr' X_l' X_l A_lr

A_lr[c, b] = a_l[r, c] where h_l(r, c) = b, and 0 elsewhere; X_l has the inputs that layer l of the
trained network sees. With Q = R R', R upper triangular, the error is |R' dv|^2, and entry j of
R' dv has the values up to j alone: value j is rounded at

    t_j = v_j - (sum over i < j of R_ij dv_i) / R_jj

where that entry would be 0. The inverse of R is the Cholesky factor with which GPTQ moves all later
values after each: the same numbers. The mean of its diagonal, times 0.01, is added to that of Q.

Q is cut into chunks of 2048 values, in the order of storage: a chunk takes 250 MB, each value in it
2048^2 / 3 operations, and each entry of a weight its number of columns, or 2048. What couples two
chunks is left out, and so are biases among the weights.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memfold.compression.compressed_model import densify
from memfold.compression.moments import moments_at
from memfold.compression.samples import Batch, take_batches
from memfold.compression.selection import named_weights
from memfold.compression.state import Compression
from memfold.errors import InputError
from memfold.quantisation import Packing, Rounding, nearest

__all__ = ["SETTING", "check_feedback", "feedback_roundings"]

SETTING = "error feedback (artifact.feedback_samples, or data= of memfold.save)"
"""What asks for it, for messages."""

_AT_ONCE = 2048
_DAMPING = 0.01
_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass(frozen=True)
class _Use:
    """A weight of one layer, as rows that see the same inputs: the groups of a convolution."""

    places: Tensor
    """Of stored values, -1 where there is none: int64, (rows, columns)."""
    factors: Tensor
    """float64, (rows, columns)."""
    moments: Tensor
    """X'X, float64, (columns, columns)."""


def check_feedback(compression: Compression | None, packing: Packing) -> Compression:
    """Check that error feedback can round the values of a model, and return its compression.

    Raises:
        InputError: It cannot, or the training has rounded them already.
    """
    if not 3 <= packing.bits <= 8:
        raise InputError(f"{SETTING} needs artifact.bits from 8 to 3, got {packing.bits}")
    if compression is None:
        raise InputError(f"{SETTING} needs a compressed model: nothing of this one is rounded")
    if compression.strategy.train_bits is not None:
        raise InputError(f"{SETTING} is not for artifact.train_bits: the training knows its bits")
    if not compression.names or compression.sources(0) is None:
        raise InputError(
            f"{SETTING} is not for compression={compression.strategy.name}, whose weights are no "
            "single stored values times numbers"
        )
    return compression


def feedback_roundings(
    compression: Compression | None, packing: Packing, data: Iterable[Batch]
) -> dict[str, Rounding]:
    """Look at samples, and return what rounds the stored values with error feedback.

    Values that anything but linear layers and convolutions uses, or a layer that no sample reaches,
    are rounded to the nearest, and so is a chunk that would not be better on the samples.

    Args:
        compression: Of the model, which stays as it is.
        packing: How the values are stored.
        data: Batches of (input, target), read once, to their end.

    Returns:
        Name of a tensor of values in the artifact -> how to round it.

    Raises:
        InputError: See `check_feedback`; there are no samples, or their inputs of some layer are
            not finite; every value is one of those that are rounded to the nearest.
    """
    compression = check_feedback(compression, packing)
    samples = take_batches(SETTING, data, num_samples=sys.maxsize)
    tensors = compression.value_tensors()
    uses, rounds_to_nearest = _look(compression, samples)
    if bool(rounds_to_nearest.all()):
        raise InputError(
            "error feedback: no stored value is one of linear layers and convolutions alone"
        )
    roundings, start = {}, 0
    for name, tensor in tensors.items():
        fixed = rounds_to_nearest[start : start + tensor.numel()]
        roundings[name] = partial(_round, uses, start, fixed)
        start += tensor.numel()
    return roundings


def _look(compression: Compression, samples: Sequence[Batch]) -> tuple[list[_Use], Tensor]:
    """Return what makes Q, and of which values that is not all: bool (values,)."""
    dense = densify(compression.model)
    weights = named_weights(dense, compression.names)
    layers = [[owner.module for owner in weight.owners] for weight in weights]
    known = {m for modules in layers for m in modules if type(m).forward in _FORWARDS}
    moments = moments_at(dense, known, samples) if known else {}
    numel = sum(tensor.numel() for tensor in compression.value_tensors().values())
    uses, is_partial = [], torch.zeros(numel, dtype=torch.bool)
    for index, modules in enumerate(layers):
        if weights[index].is_bias:
            continue
        sources = compression.sources(index)
        assert sources is not None
        places, factors = sources
        if not all(module in moments for module in modules):
            is_partial[places[places >= 0]] = True
            continue
        total = torch.stack([moments[module] for module in modules]).sum(0)
        if not bool(total.isfinite().all()):
            raise InputError(f"error feedback: inputs of {compression.names[index]} are not finite")
        size = len(total), -1, total.shape[-1]
        groups = zip(places.reshape(size), factors.reshape(size), total, strict=True)
        uses += [_Use(*group) for group in groups]
    return uses, is_partial


def _round(
    uses: list[_Use], start: int, fixed: Tensor, blocks: Tensor, scales: Tensor, bits: int
) -> Tensor:
    """Round one tensor: see `memfold.quantisation.Rounding`.

    Args:
        uses: Of all values.
        start: Place of the tensor's first value among them.
        fixed: Which of its values are rounded to the nearest, bool (numel,).
        blocks: Its values.
        scales: Of the blocks.
        bits: See `nearest`.
    """
    codes = nearest(blocks, scales, bits)
    is_largest = (blocks.abs() == blocks.abs().amax(dim=1, keepdim=True)).flatten().cpu()
    values, steps = blocks.flatten().cpu(), scales.repeat_interleave(blocks.shape[1]).cpu()
    found = codes.flatten().cpu()
    for first in range(0, len(fixed), _AT_ONCE):
        part = slice(first, min(first + _AT_ONCE, len(fixed)))
        form = _form(uses, start + part.start, start + part.stop)
        if bool(form.any()):
            keeps = fixed[part] | is_largest[part]
            found[part] = _feed(values[part], steps[part], found[part], keeps, form, bits)
    return found.view(codes.shape).to(codes)


def _form(uses: list[_Use], start: int, stop: int) -> Tensor:
    """Return the chunk of Q of the values from `start` on to before `stop`."""
    form = torch.zeros(stop - start, stop - start, dtype=torch.float64)
    for use in uses:
        is_inside = (use.places >= start) & (use.places < stop)
        for row in is_inside.any(dim=1).nonzero().flatten().tolist():
            columns = is_inside[row].nonzero().flatten()
            at, factors = use.places[row, columns] - start, use.factors[row, columns]
            products = use.moments[columns][:, columns] * factors * factors.unsqueeze(1)
            form.index_put_((at.unsqueeze(1), at), products, accumulate=True)
    return form


def _feed(
    values: Tensor, steps: Tensor, codes: Tensor, keeps: Tensor, form: Tensor, bits: int
) -> Tensor:
    """Round one value after the other; return whole numbers of steps.

    Args:
        values: float32, (n,).
        steps: Their scales, float32 (n,).
        codes: What `nearest` makes of them.
        keeps: Where that stays.
        form: Chunk of Q, (n, n).
        bits: See `nearest`.
    """
    damped = form + _DAMPING * form.diagonal().mean() * torch.eye(len(form), dtype=form.dtype)
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    feedback = (root / root.diagonal()).T.contiguous()
    found, exact, errors = codes.clone(), values.double(), torch.zeros_like(form[0])
    for j in range(len(values)):
        if not keeps[j]:
            target = exact[j] - feedback[j, :j] @ errors[:j]
            found[j] = nearest(target.float().view(1, 1), steps[j : j + 1], bits)
        errors[j] = found[j].double() * steps[j] - exact[j]
    before = codes.double() * steps - exact
    return found if errors @ form @ errors < before @ form @ before else codes
