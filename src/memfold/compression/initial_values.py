"""What the initial values of a tensor tell: whether they are noise, which another draw can replace.

Independent draws from distributions that are symmetric about zero have a sum S with

    P(|S| > t Q) <= 2 exp(-t^2 / 2),   Q the root of the sum of their squares,

for any number of them and any such distributions (Efron, "Student's t-test under symmetry
conditions", 1969). So have the products of neighbours, whose signs are as random. A tensor is
structured where one of the two sums says plainly that its values are no such draws. Small tables
say less in sums than in their order: k independent draws are sorted once in k! times.
"""

from math import isfinite, lgamma, log, prod

from torch import Tensor

__all__ = ["in_memory_order", "is_structured"]

# Elements that are looked at a time: their float64 copies stay in a processor's cache.
_CHUNK_NUMEL = 1 << 17
# How often noise may be taken for structure, about; t above for as many normal numbers.
_MISTAKES = 1e-6
_SIGNIFICANCE = 5.0
# Least |mean| over root mean square: training, and a lopsided tail, leave means that are not zero
# and do not matter either. Uniform numbers in (0, 1) have 0.87.
_LEAN = 0.5


def is_structured(tensor: Tensor) -> bool:
    """Whether the values are constant, or plainly not noise around zero.

    Zeros, as in rows for padding, do not count. One value, everywhere or beside zeros (an
    identity), is structure; so are values that lean to one sign (logarithms of decay rates, norms),
    tables that change slowly from place to place (sines and cosines), and sorted ones (ramps). A
    handful of values that differ is never plain enough; neither are NaN and infinities.

    Args:
        tensor: Any shape, real floating dtype, not on the meta device. No copy of it is made.
    """
    ordered = _in_order_of_strides(tensor.detach())
    flat = ordered.reshape(-1)
    if not isfinite(_sums(flat, 0)[0]):
        return False
    if _is_constant(flat) or _is_sorted(ordered):
        return True
    sizes = ordered.shape
    lags = {prod(sizes[dim + 1 :]) for dim, size in enumerate(sizes) if size > 1}
    return any(_leans(flat, lag) for lag in (0, *lags))


def in_memory_order(tensor: Tensor) -> Tensor:
    """Flatten a tensor in any order of its elements, without a copy where there are no gaps."""
    return _in_order_of_strides(tensor).reshape(-1)


def _in_order_of_strides(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _leans(flat: Tensor, lag: int) -> bool:
    """Whether numbers, or products of those `lag` places apart, lean to one sign."""
    total, squares, count = _sums(flat, lag)
    return total**2 > squares * max(_SIGNIFICANCE**2, _LEAN**2 * count)


def _sums(flat: Tensor, lag: int) -> tuple[float, float, int]:
    """Sum numbers, or products of those `lag` places apart; sum the squares; count non-zeros."""
    total, squares, count = 0.0, 0.0, 0
    for begin in range(0, len(flat) - lag, _CHUNK_NUMEL):
        end = min(begin + _CHUNK_NUMEL, len(flat) - lag)
        part = flat[begin:end].double()
        if lag:
            part = part * flat[begin + lag : end + lag]
        total += float(part.sum())
        squares += float(part.dot(part))
        count += int(part.count_nonzero())
    return total, squares, count


def _is_constant(flat: Tensor) -> bool:
    """Whether there is one value at most, beside zeros."""
    known = None
    for part in flat.split(_CHUNK_NUMEL):
        others = part[part != 0]
        if others.numel() > 0:
            known = others[0] if known is None else known
            if bool((others != known).any()):
                return False
    return True


def _is_sorted(tensor: Tensor) -> bool:
    """Whether all lines along some dimension rise, or all fall; sums are enough for long ones."""
    if tensor.numel() > _CHUNK_NUMEL:
        return False
    for dim, size in enumerate(tensor.shape):
        is_plain = tensor.numel() / size * lgamma(size + 1) > -log(_MISTAKES)
        steps = tensor.diff(dim=dim)
        if is_plain and bool((steps >= 0).all() or (steps <= 0).all()):
            return True
    return False
