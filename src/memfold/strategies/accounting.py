"""Count what a model holds, each tensor once."""

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

from memfold.errors import InputError

__all__ = ["state_tensors", "tensor_bytes", "unique_tensors"]


def unique_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor once, under its first name, when several names share its storage."""
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() > 0 and key in seen:
            continue
        seen.add(key)
        yield name, tensor


def state_tensors(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of `model`, a tied tensor once.

    Args:
        model: Any module.
        leave_out: State-dict names to skip.

    Raises:
        InputError: The state dict holds something that is not a tensor.
    """
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} in the model's state is a {type(value).__name__}; "
                "only tensors can be stored"
            )
    return dict(unique_tensors((k, v) for k, v in state.items() if k not in leave_out))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, each counted as given."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
