"""Numbers in a state dict that tell what its values mean.

Values fit one strategy with one seed and ratio, and one set of positions. What they fit is hashed
to signs, +1 and -1: floating-point numbers, because code that averages state dicts takes those and
leaves integers as they are. An average of different signs is neither, one of the same signs is the
same, in every dtype.
"""

import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.base import DEFAULT_RATIO, Strategy

__all__ = ["check_marks", "identity_of", "marks_of"]

_NUMBER = 63  # bits of a derived seed
_TOLERANCE = 1e-3  # rounding of an average, in half precision


def identity_of(strategy: Strategy) -> str:
    """Describe whose values a model has, and how many there may be."""
    budget = strategy.budget_bytes
    ratio = DEFAULT_RATIO if strategy.ratio is None and budget is None else strategy.ratio
    return f"{strategy.name} seed={strategy.seed} ratio={ratio} budget_bytes={budget}"


def marks_of(*parts: str | int) -> Tensor:
    """Hash `parts` to float32 signs, on the CPU."""
    number = derive_seed(*parts)
    return torch.tensor([1.0 if number >> bit & 1 else -1.0 for bit in range(_NUMBER)])


def check_marks(found: Tensor, expected: Tensor, strategy: Strategy) -> None:
    """Check that values with the marks `found` belong where the marks `expected` are needed.

    Raises:
        InputError: They do not.
    """
    found = found.detach().to("cpu", torch.float32)
    if found.shape == expected.shape and bool(((found - expected).abs() < _TOLERANCE).all()):
        return
    if found.shape == expected.shape and bool(((found.abs() - 1).abs() < _TOLERANCE).all()):
        raise InputError(
            f"these values belong to another seed, ratio or strategy than {strategy}, or to other "
            "weights"
        )
    raise InputError(
        "these values are an average of models that keep weights at different positions: average "
        "dense weights, those of memfold.densify(model)"
    )
