"""Whether weights have been trained: said where a strategy starts from other ones.

Initialisers draw the elements of a matrix alike. Then the mean squares of its rows vary as means of
so many equal draws do, whatever is drawn, and so do those of its columns. Training makes some
outputs and some inputs matter more, and both vary more. Rows alone, or columns alone, do not tell:
blocks of a packed matrix may start with scales of their own.
"""

from collections.abc import Sequence
from math import sqrt
from warnings import warn

from torch import Tensor

from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context
from memfold.errors import InputError

__all__ = ["report_loss"]

# Leading elements of a matrix that are looked at: a megabyte of float64.
_SAMPLE_NUMEL = 1 << 17
# Fewer rows or columns, or fewer elements in each, tell nothing.
_LEAST_SIDE = 8
# Standard deviations of a normal number; a fresh model is below 0 as a rule.
_SIGNIFICANCE = 3.3


def report_loss(weights: Sequence[CompressibleWeight], context: Context, message: str) -> None:
    """Warn once where the values of these weights, taken together, are plainly not fresh draws.

    Args:
        weights: With any values; those on the meta device are skipped.
        context: Of the compression that loses them.
        message: What the strategy does with them.

    Raises:
        InputError: They were given to start from.
    """
    if context.start is not None:
        raise InputError(f"init_from gives weights, and {message}")
    tensors = [weight.tensor.detach() for weight in weights if not weight.tensor.is_meta]
    found = [number for tensor in tensors if (number := _unevenness(tensor)) is not None]
    if found and sum(found) > _SIGNIFICANCE * sqrt(len(found)):
        warn(f"these weights have been trained, as it seems: {message}", stacklevel=2)


def _unevenness(tensor: Tensor) -> float | None:
    """Say how much more rows and columns differ than equal draws do, the lesser of the two.

    Returns:
        About a standard normal number or less for equal draws; `None` for small matrices.
    """
    matrix = tensor.reshape(len(tensor), -1)
    squares = matrix[: max(_LEAST_SIDE, _SAMPLE_NUMEL // matrix.shape[1])].double().square()
    # Rows of padding, and inputs without weights, are no draws.
    squares = squares[squares.any(dim=1)]
    squares = squares[:, squares.any(dim=0)]
    if min(squares.shape) < _LEAST_SIDE:
        return None
    variance = float(squares.var())
    if variance == 0:
        return None
    # Orthogonal rows and columns are evener than draws; that says nothing about other weights.
    return max(-1.0, min(_excess(squares, variance), _excess(squares.mT, variance)))


def _excess(squares: Tensor, variance: float) -> float:
    """Turn the variance of the rows' means, a chi-squared number, into a standard normal one.

    This is the approximation of Wilson and Hilferty ("The distribution of chi-square", 1931).
    """
    rows, columns = squares.shape
    ratio = columns * float(squares.mean(dim=1).var()) / variance
    spread = 2 / (9 * (rows - 1))
    return (ratio ** (1 / 3) - (1 - spread)) / sqrt(spread)
