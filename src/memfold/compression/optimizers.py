"""Optimizers that wrap others, and the state that they keep for parameters whose values move."""

from collections import deque
from collections.abc import Callable, Collection, Iterator

from torch import Tensor
from torch.optim import Optimizer

from memfold.errors import InputError

__all__ = ["check_movable", "in_bucket_of", "keeps_state_around", "move_state", "optimizers_in"]


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, outer ones first.

    SAM, Lookahead, ZeRO and the wrappers of Lightning and Accelerate hold the optimizer that takes
    the steps as an attribute.
    """
    found: list[Optimizer] = []

    def visit(one: Optimizer) -> None:
        if any(one is known for known in found):
            return
        found.append(one)
        for value in list(vars(one).values()):
            for inner in value if isinstance(value, list | tuple) else (value,):
                if isinstance(inner, Optimizer):
                    visit(inner)

    visit(optimizer)
    return found


def check_movable(optimizer: Optimizer, values: Collection[Tensor]) -> None:
    """Check that the state of an optimizer can follow when the entries of `values` move.

    Args:
        optimizer: One that may wrap others.
        values: Parameters, each of shape (kept,).

    Raises:
        InputError: It does not train a parameter that has a gradient, or keeps something else than
            one tensor of the parameter's shape, and numbers, for each parameter.
    """
    moving = {id(value) for value in values}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(value.grad is not None and id(value) not in trained for value in values):
        raise InputError(
            f"the optimizer ({type(optimizer).__name__}) trains only some of the weights that "
            "move: their gradients are there, so train them with one optimizer, or freeze them"
        )
    shapes = {value.shape for value in values if value.numel() > 1}
    for one in optimizers_in(optimizer):
        for parameter, state in one.state.items():
            if not isinstance(parameter, Tensor):  # of all parameters together: a count of steps
                if any(entry.numel() > 1 for entry in _tensors_in(state)):
                    raise _unmovable(one, f"its state {parameter!r}")
                continue
            for key, entry in state.items():
                if not _is_per_parameter(entry, parameter, id(parameter) in moving):
                    raise _unmovable(one, f"its state {key!r}")
        for key, entry in vars(one).items():
            if key in ("state", "param_groups", "defaults") or isinstance(entry, Optimizer):
                continue
            if any(t.shape in shapes and id(t) not in trained for t in _tensors_in(entry)):
                raise _unmovable(one, f"copies of weights in its attribute {key!r}")


def keeps_state_around(optimizer: Optimizer, values: Collection[Tensor]) -> bool:
    """Return whether a wrapper keeps state of its own for `values`, as SAM does between its steps.

    The wrapper then acts on parameters that the optimizer inside skips for want of a gradient.
    """
    outer, *inner = optimizers_in(optimizer)
    return bool(inner) and any(
        value in outer.state
        and all(outer.state[value] is not one.state.get(value) for one in inner)
        for value in values
    )


def move_state(optimizer: Optimizer, values: Tensor, moved: Callable[[Tensor], Tensor]) -> None:
    """Move all that an optimizer, and those that it wraps, keep for `values`: momentum, moments."""
    seen: set[int] = set()
    for one in optimizers_in(optimizer):
        state = one.state.get(values, {})
        if id(state) in seen:  # wrappers may share it
            continue
        seen.add(id(state))
        for key, entry in state.items():
            if isinstance(entry, Tensor) and entry.shape == values.shape:
                state[key] = moved(entry)


def in_bucket_of(old: Tensor, new: Tensor) -> Tensor:
    """Return `new`, in the memory of `old` where that is a part of a bucket (DDP, ZeRO)."""
    is_view = old.untyped_storage().nbytes() > old.numel() * old.itemsize
    return old.copy_(new) if is_view and old.shape == new.shape else new


def _is_per_parameter(entry: object, parameter: Tensor, is_moving: bool) -> bool:
    if not isinstance(entry, Tensor):
        return next(_tensors_in(entry), None) is None
    if entry.numel() <= 1 or entry.shape == parameter.shape:
        return True
    return not is_moving and entry.numel() <= parameter.numel()


def _tensors_in(entry: object) -> Iterator[Tensor]:
    if isinstance(entry, Tensor):
        yield entry
    elif isinstance(entry, dict):
        yield from _tensors_in(list(entry.values()))
    elif isinstance(entry, list | tuple | deque):
        for item in entry:
            yield from _tensors_in(item)


def _unmovable(optimizer: Optimizer, what: str) -> InputError:
    return InputError(
        f"{type(optimizer).__name__} keeps {what}, which is not one tensor per parameter and "
        "cannot follow weights that change their positions: take another optimizer"
    )
