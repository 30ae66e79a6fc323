"""Numbers in state dicts and artifacts that tell what the values there mean.

Values fit one strategy with one seed and ratio, and one set of positions: what they fit is hashed
to one number. Where no average may mix them, it is stored as marks, its bits as +1 and -1:
floating-point numbers, because code that averages state dicts takes those and leaves integers as
they are. An average of different marks is neither, one of the same marks is the same, in every
dtype.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from memfold.compression.strategy import DEFAULT_RATIO, Strategy
from memfold.errors import InputError
from memfold.seeding import derive_seed

__all__ = ["check_marks", "check_names", "fingerprint", "identity_of", "is_fingerprint", "marks_of"]

_NUMBER = 63  # bits of a derived seed
_TOLERANCE = 1e-3  # rounding of an average, in half precision


def identity_of(strategy: Strategy) -> str:
    """Describe whose values a model has, and how many there may be."""
    budget = strategy.budget_bytes
    ratio = DEFAULT_RATIO if strategy.ratio is None and budget is None else strategy.ratio
    return f"{strategy.name} seed={strategy.seed} ratio={ratio} budget_bytes={budget}"


def fingerprint(*parts: str | int | Tensor) -> int:
    """Hash what values mean; of a tensor the bytes count, wherever it is."""
    return derive_seed(*(_digest(part) if isinstance(part, Tensor) else part for part in parts))


def is_fingerprint(found: Tensor | None, number: int) -> bool:
    """Whether a stored tensor is this fingerprint."""
    return found is not None and found.numel() == 1 and int(found) == number


def marks_of(number: int) -> Tensor:
    """Return the marks of a fingerprint, float32, on the CPU."""
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


def check_names(state: Mapping[str, Any], prefix: str, own: str) -> None:
    """Check that a state dict that is loaded has the names that `state_dict` gives.

    Args:
        state: What comes in.
        prefix: Before the names of the compressed model in it.
        own: Name on the root that every state dict of the compressed model has.

    Raises:
        InputError: It has this name behind another: nothing would be loaded.
    """
    others = [name for name in state if name.endswith(f".{own}")]
    if not prefix and own not in state and others:
        raise InputError(
            f"{own} came as {others[0]}: the state dict is of a model around this one, or the "
            "model's own load_state_dict renames it; then call "
            "torch.nn.Module.load_state_dict(model, state)"
        )


def _digest(tensor: Tensor) -> str:
    return blake2b(tensor.cpu().numpy().tobytes()).hexdigest()
